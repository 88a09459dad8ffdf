"""The rooms of `train.py`: reading data, the tasks, evaluation, and writing the bundle."""
