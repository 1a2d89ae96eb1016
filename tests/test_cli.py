from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cli import check_batches, run_export, run_study
from engine.core.errors import StudyError
from engine.profile import Profile

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(image_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    root = image_folder({"cat": 8, "dog": 8}, below="pictures")
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: toy\nreader: {{name: imagefolder, root: {root}}}\npreprocess: {{size: 16}}\n"
        "split: {group: none}\ngenerators: {t: {name: traditional}}\nrequest: {per_class: 3}\n"
    )
    return [
        str(study), "--set", "profile.runtime=inline", "--set", f"profile.storage={tmp_path}/runs"
    ]  # fmt: skip


def test_whole_run_prints_the_path_of_the_sheet(command, tmp_path, capsys) -> None:
    assert run_study(command) == 0
    sheet = tmp_path / "runs" / "pages" / "toy" / "generate.t.png"
    assert str(sheet) in capsys.readouterr().err
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert run_study(command) == 0
    assert capsys.readouterr().err.count("done:") == 6


def test_dry_run_prints_what_is_done_and_why_not(command, capsys, tmp_path) -> None:
    assert run_study([*command, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "ingest" in output
    assert "missing: not computed yet" in output
    assert not (tmp_path / "runs").exists()
    run_study([*command, "--until", "embed"])
    capsys.readouterr()
    run_study([*command, "--dry-run"])
    output = capsys.readouterr().out
    assert output.count("  done") == 2
    assert "generate.t" in output
    assert "needs request.t" in output


def test_until_stops_and_discard_discards(command, capsys) -> None:
    assert run_study([*command, "--until", "select"]) == 0
    assert "request" not in capsys.readouterr().err
    assert run_study(command) == 0
    capsys.readouterr()
    assert run_study([*command, "--discard", "generate"]) == 0
    output = capsys.readouterr().err
    assert "discarded 2 shards" in output
    assert "make the images" in output


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--set", "request.ratio=-1"], 2, "request.ratio"),
        (["--set", "nonsense=1"], 2, "nonsense: no such field"),
        (["--until", "trian"], 2, "no step 'trian'"),
        (["--preview", "0"], 2, "--preview"),
        (["--preview", "2", "--until", "embed"], 2, "no generate step"),
        (["--dry-run", "--discard", "embed"], 2, "cannot be combined"),
        (["--profile", "nowhere.yaml"], 2, "no such file"),
        (["--set", "profile.device=tpu"], 2, "profile: device"),
        (["--set", "cluster.k=50"], 1, "the largest k for this data is"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(command, capsys, more, code, says) -> None:
    assert run_study([*command, *more]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert says in error[0]


def test_changed_data_is_rejected_by_name(command, capsys, tmp_path) -> None:
    assert run_study([*command, "--until", "ingest"]) == 0
    (tmp_path / "pictures" / "cat" / "000.png").rename(tmp_path / "pictures" / "dog" / "new.png")
    assert run_study([*command, "--until", "ingest"]) == 1
    assert "--discard ingest" in capsys.readouterr().err
    assert run_study([*command, "--until", "ingest", "--discard", "ingest"]) == 0


def test_preview_shows_images_and_cost_and_commits_no_shard(command, capsys, tmp_path) -> None:
    assert run_study([*command, "--preview", "2"]) == 0
    page = tmp_path / "runs" / "pages" / "toy" / "preview.html"
    assert str(page) in capsys.readouterr().err
    text = page.read_text()
    assert text.count("synthetic image of cat") == 2
    assert text.count("real image of dog") == 2
    assert "time to generate them" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert not (tmp_path / "runs" / "generated").exists()


def test_preview_escapes_class_names(tmp_path, image_folder, capsys) -> None:
    root = image_folder({"a&b<i>": 8, "dog": 8})
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: toy\nreader: {{name: imagefolder, root: {root}}}\npreprocess: {{size: 16}}\n"
        "split: {group: none}\ngenerators: {t: {name: traditional}}\nrequest: {per_class: 3}\n"
    )
    storage = ["--set", "profile.runtime=inline", "--set", f"profile.storage={tmp_path}/runs"]
    assert run_study([str(study), *storage, "--preview", "1"]) == 0
    text = (tmp_path / "runs" / "pages" / "toy" / "preview.html").read_text()
    assert "a&amp;b&lt;i&gt;" in text
    assert "<i>" not in text


def test_script_exits_with_2_before_anything_starts(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/run_study.py", "configs/digits.yaml", "--set", "seed=-1"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "seed" in done.stderr


def test_export_prints_its_counts_and_errors_are_one_line(command, tmp_path, capsys) -> None:
    asked = [*command, "--to", f"{tmp_path}/out", "--format", "csv", "--arm"]
    assert run_export([*asked, "t"]) == 2
    assert "ingest is not done (not computed yet)" in capsys.readouterr().err
    assert run_study(command) == 0
    assert run_export([*asked, "t"]) == 0
    assert f"{tmp_path}/out" in capsys.readouterr().err
    written = len(list((tmp_path / "out" / "images").iterdir()))
    assert written == 16 + 6
    assert run_export([*asked, "t"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_batches_that_workers_cannot_share_are_rejected_early(bars_study) -> None:
    study = bars_study(training={"steps": 4, "batch_size": 12, "gradient_accumulation_steps": 2})
    check_batches(study, Profile(trial={"workers": 3}))
    with pytest.raises(StudyError, match=r"^profile: trial\.workers: 4 workers .* multiple of 8$"):
        check_batches(study, Profile(trial={"workers": 4}))
    check_batches(study, Profile(trial={"workers": 4}, runtime="inline"))


def test_pipe_that_closes_early_is_not_a_success() -> None:
    script = (
        "import engine.cli as cli, sys\n"
        "def act():\n"
        "    while True:\n"
        "        cli.say('a line')\n"
        "cli.main(act)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "a line\n"
    process.stderr.close()
    assert process.wait(timeout=60) == 141
