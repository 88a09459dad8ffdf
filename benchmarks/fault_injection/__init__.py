"""What happens when things go wrong: a served model behind its front door, and what is done to it."""
