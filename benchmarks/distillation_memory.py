"""Peak memory of a training, against the number of texts it learns from.

Anonymous memory is what a process holds of its own; pages of memory-mapped files, which the system takes back when
it needs them, are not in it. Each training runs in its own process; a thread reads /proc every 20 ms.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

FEW, MANY = 1_000, 20_000


def memory(folder: Path, data: Path) -> dict[str, Any]:
    """`memory_ratio`, and bytes of kept outputs for each sample, as stated and as the file has them."""
    found = {}
    for count in (FEW, MANY):
        command = [sys.executable, __file__, str(data), str(folder / f"memory-{count}"), str(count)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[count] = json.loads(said.splitlines()[-1])
    return {
        "memory_ratio": found[MANY]["peak_bytes"] / found[FEW]["peak_bytes"],
        "memory_mb": found[MANY]["peak_bytes"] / 1e6,
        "cache_bytes_per_sample": found[MANY]["stated"],
        "cache_bytes_per_sample_on_disk": found[MANY]["on_disk"],
    }


def _anonymous() -> int:
    """Bytes of this process's anonymous memory, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Train a small student of a small teacher on so many texts, with the outputs kept; print its peak."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from potstill.compress.distill import Distill
    from potstill.compress.lesson import Lesson
    from potstill.compress.output_cache import OutputCache
    from potstill.compress.student import Student
    from potstill.validate.checkpoint import Checkpoint
    from potstill.validate.data import load_examples
    from potstill.validate.task import TASKS

    data, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(data / "sst2-teacher")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    task = TASKS["text-classification"]
    teacher = task.load(Checkpoint(str(folder / "teacher")), max_length=64)
    columns = {"text": "sentence"}
    examples = load_examples(str(data / "sst2" / "train.tsv"), task.features, columns).with_labels(teacher.labels)
    train, held_out = examples.take(range(count), "train"), examples.take(range(count, count + 64), "held out")
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _anonymous())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lesson = Lesson(task, teacher, train, held_out, 0, folder / "work", outputs=folder / "outputs")
    Distill(epochs=2)(Student(layers=1)(teacher, task, {"max_length": 64}, 0), lesson)
    done.set()
    watcher.join()
    file = max((folder / "outputs").glob("*/outputs.bin"), key=lambda path: path.stat().st_size)
    stated = OutputCache(file.parent, count, 2, classes=True).bytes_per_row
    print(json.dumps({"peak_bytes": peak[0], "stated": stated, "on_disk": file.stat().st_size / count}))


if __name__ == "__main__":
    main()
