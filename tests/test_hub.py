"""A model and a set on the hub, as far as that can be seen without it: from a cache that holds both, offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets.packaged_modules.json.json import Json
from test_runs import SHORT, TINY

MODEL, DATASET = "1" * 40, "2" * 40  # commits


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """HF_HOME with somebody/tiny and two configurations of somebody/set, whose columns have names of their own."""
    home = tmp_path_factory.mktemp("hf")
    repo = home / "hub" / "models--somebody--tiny"
    shutil.copytree("tiny", repo / "snapshots" / MODEL, ignore=shutil.ignore_patterns("questions", "build.py"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(MODEL)
    for name in ("zh", "en"):
        files = {}
        for split, n in (("train", 20), ("test", 12)):
            rows = [{"文本": f"{name}：1加{i}等于几？", "结果": str(1 + i), "question": "none"} for i in range(n)]
            files[split] = home / f"{name}-{split}.jsonl"
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
        builder = Json(  # as load_dataset makes it
            cache_dir=str(home / "datasets"),
            dataset_name="set",
            repo_id="somebody/set",
            hash=DATASET,
            config_name=name,
            data_files={split: [str(file)] for split, file in files.items()},
        )
        builder.download_and_prepare()
        folder = Path(builder.cache_dir)
        folder.parents[1].rename(folder.parents[2] / name)  # of a configuration of the hub it is not made of the files
    return home


def offline(home, *arguments):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_the_commits_are_in_eval_json(home, tmp_path):
    ids = ["--model", "somebody/tiny", "--dataset", "somebody/set:zh"]
    columns = ["--question_column", "文本", "--answer_column", "结果"]
    out = tmp_path / "out"
    result = offline(home, *TINY, *SHORT, *ids, *columns, "--max_steps", 1, "--output_dir", out)
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "eval.json").read_text())["revisions"] == {"model": MODEL, "dataset": DATASET}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all(sample["question"].startswith("zh：") for sample in samples)

    result = offline(home, "infer.py", "--adapter", out / "adapter", "--eval", "test", "--limit", 10)
    assert result.returncode == 0, result.stderr
    assert "10 questions of somebody/set:zh (test)" in result.stdout
