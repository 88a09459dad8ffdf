"""How fast train.py trains, and in how much memory, beside the Hugging Face Trainer as it is and a bare loop.

Speed: SST-2, MiniLM. In each round all ways of training see the same rows once, one way after the other in one process;
a figure is the median over rounds of the ratio within a round. Memory: a subset of SQuAD, a process for each way.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import train
from benchmarks.quality_data import ROOT
from benchmarks.speed.__main__ import machine
from handler import cpus
from training import base_model, defaults, tasks
from training.batches import parts
from training.interrupts import INTERRUPTED

_EXAMPLES = """examples:
  benchmarks/training            # writes benchmarks/training-results.json and the tables of docs/training.md
  benchmarks/training --quick    # few rows, prints only: shows that it runs"""
RESULTS = ROOT / "benchmarks" / "training-results.json"
DOCS = ROOT / "docs" / "training.md"
STOCK, STOCK_32, GROUPED, OURS, BARE = "stock-8", "stock-32", "grouped", "ours", "bare"
WAYS = {
    STOCK: "Trainer as it is: fp32, batches of 8 in random order",
    STOCK_32: "the same in batches of 32",
    GROUPED: "Trainer with bf16 and group_by_length, batches of 32",
    OURS: "train.py as it is",
    BARE: "a bare loop over the batches of train.py",
}
BATCH, SEED, ROUNDS, ROWS, LONG_ROWS = 32, 42, 5, 640, 32


def now() -> float:
    """Seconds; on one thread those that it computed, so that what else the machine does counts for less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock(TrainerCallback):
    """The seconds that an epoch takes, without what is made once before it and after it."""

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = now()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds = now() - self.started


def stock(way: str, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: Path) -> float:
    """Seconds of an epoch of the Trainer, as its documentation has it. rows: `texts`, one or two each, and targets."""
    given: dict[str, Any] = {} if way == STOCK else {"per_device_train_batch_size": BATCH}
    if way == GROUPED:
        given |= {"bf16": defaults.bf16()[0], "train_sampling_strategy": "group_by_length", "learning_rate": 1e-4}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, num_train_epochs=1, save_strategy="no", dataloader_pin_memory=False, **given
    )
    clock = Clock()
    trainer = Trainer(
        model, arguments, DataCollatorWithPadding(tokenizer), rows, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.train()
    return clock.seconds


def ours(task: str, file: Path, folder: Path) -> Trainer:
    """The Trainer that train.py would use: one epoch, nothing evaluated or saved."""
    name, options, arguments = (
        task,
        *train.parse(
            [
                *(
                    "--task",
                    task,
                    "--train-file",
                    str(file),
                    "--validation-file",
                    str(file),
                    "--output-dir",
                    str(folder),
                ),
                *(
                    "--num-train-epochs",
                    "1",
                    "--eval-strategy",
                    "no",
                    "--save-strategy",
                    "no",
                    "--logging-strategy",
                    "no",
                ),
                *("--load-best-model-at-end", "false"),
            ]
        ),
    )
    base = base_model.resolve(None)
    loaded = tasks.load(name)
    splits = loaded.read(options, SEED, base)
    model, processor = loaded.load(base, splits, options)
    settings = loaded.settings(model, processor, options)
    return loaded.trainer(model, processor, splits, options, arguments, settings)


def bare(trainer: Any) -> float:
    """Seconds of an epoch over the Trainer's batches, with its settings, without the Trainer."""
    batches, model, arguments = list(trainer.get_train_dataloader()), trainer.model.train(), trainer.args
    optimizer = trainer.create_optimizer()
    learning = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    average = [weight.clone() for weight in learning]
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    started = now()
    for batch in batches:
        pieces = parts(trainer._hidden(batch), trainer._most_tokens)
        for piece in pieces:
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                loss = model(**piece).loss * (len(piece["input_ids"]) / len(batch["input_ids"]))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, learning, 0.01)
    return now() - started


def sst2_rows(data: Path, count: int, seed: int, place: Path) -> Path:
    """A file of rows of SST-2, drawn at random."""
    Dataset.from_csv(str(data / "sst2" / "train.csv")).shuffle(seed=seed).select(range(count)).to_csv(str(place))
    return place


def speed_round(data: Path, work: Path, number: int, count: int) -> dict[str, float]:
    """Rows a second of each way, of the same rows."""
    file = sst2_rows(data, count, number, work / f"rows-{number}.csv")
    location = base_model.resolve(None).location
    tokenizer = AutoTokenizer.from_pretrained(location)
    rows = Dataset.from_csv(str(file)).class_encode_column("label")
    rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=256), batched=True)

    def fresh(name: str) -> Callable[[], float]:
        if name in (OURS, BARE):
            trainer = ours("text-classification", file, work / "ours")
            return (lambda: bare(trainer)) if name == BARE else (lambda: timed(trainer))
        model = AutoModelForSequenceClassification.from_pretrained(location, num_labels=2)
        return lambda: stock(name, model, tokenizer, rows, work)

    # The order turns, so that no way always comes first.
    names = [*WAYS][number % len(WAYS) :] + [*WAYS][: number % len(WAYS)]
    return {name: round(count / fresh(name)(), 2) for name in names}


def timed(trainer: Trainer) -> float:
    """Seconds of the trainer's epoch."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def squad_step(way: str, data: Path, work: Path, count: int) -> float:
    """Trains on questions with long contexts; returns the peak memory of this process in MB."""
    rows = [json.loads(line) for line in (data / "squad" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    # The longest ones, which are what decides the peak.
    rows = sorted(rows, key=lambda row: -len(row["context"]))[:count]
    file = work / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if way == OURS:
        ours("question-answering", file, work / "ours").train()
    else:
        location = base_model.resolve(None).location
        tokenizer = AutoTokenizer.from_pretrained(location)
        encoded = tokenizer(
            [row["question"] for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=384,
        )
        zeros = [0] * len(rows)
        known = Dataset.from_dict({**encoded, "start_positions": zeros, "end_positions": zeros})
        model = AutoModelForQuestionAnswering.from_pretrained(location)
        stock(way, model, tokenizer, known, work)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(data: Path, work: Path, count: int) -> dict[str, float]:
    """The peak memory of each way in MB, each in a process of its own."""
    found: dict[str, float] = {}
    for way in (STOCK, STOCK_32, GROUPED, OURS):
        command = [sys.executable, "-m", "benchmarks.training", "--peak", way, "--data", str(data), "--work", str(work)]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run([*command, "--rows", str(count)], check=True, cwd=ROOT, capture_output=True, text=True)
        found[way] = round(float(done.stdout.split()[-1]))
    return found


def ratio(rounds: Sequence[Mapping[str, float]], way: str, other: str) -> dict[str, float]:
    """How many times as fast a way is as another: the median over the rounds, the lowest and the highest."""
    ratios = [entry[way] / entry[other] for entry in rounds]
    return {"median": round(median(ratios), 2), "lowest": round(min(ratios), 2), "highest": round(max(ratios), 2)}


def targets(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets 9 to 12."""
    rounds, peaks = found["rounds"], found["memory"]
    listed: list[dict[str, Any]] = []
    for number, other, least in ((9, STOCK_32, 5.0), (10, GROUPED, 1.35), (11, BARE, 0.95)):
        what = f"rows a second of train.py to those of: {WAYS[other]}"
        value = ratio(rounds, OURS, other)["median"]
        listed.append({"id": str(number), "what": what, "value": value, "target": least, "met": value >= least})
    share = round(peaks[OURS] / peaks[STOCK_32], 2)
    what = "peak memory on squad to that of the Trainer as it is, in batches of 32 (at most)"
    return [*listed, {"id": "12", "what": what, "value": share, "target": 0.5, "met": share <= 0.5}]


def table(found: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| way to train | rows a second (SST-2) | train.py is faster by | peak memory (SQuAD) |",
        "|---|---|---|---|",
    ]
    for way, what in WAYS.items():
        rate = median(entry[way] for entry in found["rounds"])
        by = ratio(found["rounds"], OURS, way)
        faster = "" if way == OURS else f"**{by['median']:.2f}** ({by['lowest']:.2f} to {by['highest']:.2f})"
        peak = f"{found['memory'][way]:.0f} MB" if way in found["memory"] else ""
        lines.append(f"| {what} | {rate:.0f} | {faster} | {peak} |")
    return "\n".join(lines)


def table_in(text: str) -> str:
    """The table of results in docs/training.md."""
    start = text.index("| way to train |")
    return "\n".join(takewhile(lambda line: line.startswith("|"), text[start:].splitlines()))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/training",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one round of few rows, nothing written")
    parser.add_argument("--threads", type=int, default=cpus.cores(), help="that torch computes on (default: the cores)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the comparison of speed (default: {ROUNDS})")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of SST-2 in each round (default: {ROWS})")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse(sys.argv[1:])
    if not (arguments.data / "sst2").is_dir():
        sys.exit(f"benchmarks/training: {arguments.data}/sst2 is missing; name the folder of the data sets with --data")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(squad_step(arguments.peak, arguments.data, arguments.work, arguments.rows))
        return
    count, long_count, rounds = (96, 32, 1) if arguments.quick else (arguments.rows, LONG_ROWS, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        work = Path(folder)
        found: dict[str, Any] = {
            "command": " ".join(["benchmarks/training", *sys.argv[1:]]),
            "machine": {**machine(), "threads": arguments.threads},
            "rows": count,
            "clock": "seconds of CPU" if arguments.threads == 1 else "seconds",
            "rounds": [],
            "memory": memory(arguments.data, work, long_count),
        }
        speed_round(arguments.data, work, rounds, count)  # kernels are made for each new shape of a batch
        for number in range(rounds):
            found["rounds"].append(speed_round(arguments.data, work, number, count))
            print(json.dumps(found["rounds"][-1]), flush=True)
    found["targets"] = targets(found)
    print(table(found))
    for target in found["targets"]:
        print(
            f"{target['what']}: {target['value']} (target {target['target']}): {'met' if target['met'] else 'MISSED'}"
        )
    if not arguments.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        text = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(text.replace(table_in(text), table(found)), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
