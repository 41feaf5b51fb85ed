"""Run folders: never mixed up, never lost, continued only with their own configuration."""

import io
import json
import signal
import subprocess
import sys

import pytest

from deploy_sparse import artifact
from deploy_sparse.errors import ArtifactError, Interrupted, RunError
from deploy_sparse.train.console import Console, Silence
from deploy_sparse.train.interrupt import Interrupts
from deploy_sparse.train.run import open_run

CONFIG = {"seed": 0, "fit": {"epochs": 3}}


def opened(folder, *, resume=False, config=CONFIG, recipe="r", console=None, changeable=()):
    return open_run(
        folder,
        recipe,
        config,
        resume=resume,
        command="deploy-sparse run r --resume",
        console=console or Console(io.StringIO()),
        changeable=changeable,
    )


def status(folder):
    return json.loads((folder / "run.json").read_text())["status"]


def save(value, folder):
    artifact.write_artifact(folder, "thing", {"v": value}, {})


def load(folder):
    return (artifact.read_artifact(folder, "thing", remake="mk").folder / "v").read_bytes()


def test_a_stage_is_made_once_and_loaded_after_that(tmp_path):
    made = []

    def make():
        made.append(1)
        return b"x"

    for resume in (False, True):
        with opened(tmp_path / "run", resume=resume) as run:
            assert run.once("stage", make, save, load) == b"x"
    assert made == [1]


def test_a_damaged_stage_says_what_to_remove(tmp_path):
    with opened(tmp_path / "run") as run:
        run.once("stage", lambda: b"x", save, load)
        (tmp_path / "run" / "stage" / "v").write_bytes(b"y")
        with pytest.raises(
            ArtifactError, match=r"is damaged[\s\S]*remove .*stage and continue with: deploy-sparse run r --resume"
        ):
            run.once("stage", lambda: b"x", save, load)


def test_an_occupied_folder_is_refused_and_untouched(tmp_path):
    with opened(tmp_path / "run") as run:
        run.finish({"a": 1})
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with (
        pytest.raises(
            RunError, match=r"already holds a run of r \(status: finished\)[\s\S]*--resume, or choose another folder"
        ),
        opened(tmp_path / "run"),
    ):
        pass
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="is not empty and holds no run"), opened(tmp_path / "mine", resume=True):
        pass


def test_a_changed_configuration_is_refused_with_its_difference(tmp_path):
    with opened(tmp_path / "run"):
        pass
    with (
        pytest.raises(RunError, match=r"another configuration: fit.epochs: 3 -> 4"),
        opened(tmp_path / "run", resume=True, config={"seed": 0, "fit": {"epochs": 4}}),
    ):
        pass
    with pytest.raises(RunError, match=r"recipe: r -> other"), opened(tmp_path / "run", resume=True, recipe="other"):
        pass


def test_a_torn_last_line_of_metrics_is_cut(tmp_path):
    with opened(tmp_path / "run") as run:
        run.log({"epoch": 0})
        path = run.folder / "metrics.jsonl"
        path.write_text(path.read_text() + '{"epo')
    with opened(tmp_path / "run", resume=True) as run:
        run.log({"epoch": 1})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 0}, {"epoch": 1}]


def test_two_processes_do_not_share_a_folder(tmp_path):
    with (
        opened(tmp_path / "run"),
        pytest.raises(RunError, match="another process is running in"),
        opened(tmp_path / "run", resume=True),
    ):
        pass


def test_a_folder_in_use_says_so_before_anything_else(tmp_path):
    with (
        opened(tmp_path / "run"),
        pytest.raises(RunError, match="another process is running in"),
        opened(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot be written"), opened(tmp_path / "file" / "run"):
        pass


def test_resuming_elsewhere_is_said(tmp_path):
    with opened(tmp_path / "run"):
        pass
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "9.'))
    stream = io.StringIO()
    with opened(tmp_path / "run", resume=True, console=Console(stream)):
        pass
    assert "started elsewhere" in stream.getvalue()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_the_next_poll_with_the_shells_exit_code(tmp_path, number, code):
    with (
        Interrupts("again") as interrupts,
        pytest.raises(Interrupted, match=r"stopped by SIG[\s\S]*next step: again") as caught,
        opened(tmp_path / "run"),
    ):
        interrupts.poll(signal.raise_signal(number) or "all is saved")
    assert caught.value.exit_code == code
    assert status(tmp_path / "run") == "interrupted"


def test_no_signal_no_interrupt_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts("again") as interrupts:
        interrupts.poll()
    assert signal.getsignal(signal.SIGTERM) == before


def test_plain_progress_prints_first_and_last():
    stream = io.StringIO()
    with Console(stream).task("training", 9) as progress:
        for done in range(1, 10):
            progress.advance(done, "validation 50%")
    assert stream.getvalue().splitlines() == ["training: 1/9 validation 50%", "training: 9/9 validation 50%"]


def test_quiet_keeps_warnings():
    stream = io.StringIO()
    console = Console(stream, quiet=True)
    console.say("news")
    console.warn("careful")
    assert stream.getvalue() == "warning: careful\n"


def test_live_progress_draws_a_bar_and_leaves_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Console(stream).task("training", 2) as progress:
        progress.advance(1, "validation 50%")
        progress.advance(2, "validation 60%")
    assert stream.getvalue().endswith("training\n")
    assert "2/2" in stream.getvalue()


def test_a_stage_is_saved_before_the_run_stops(tmp_path):
    polls = []

    def poll(*saved):
        polls.append(1)
        if len(polls) == 2:
            raise Interrupted("stopped", signal_number=15, fix="go on")

    stopping = open_run(
        tmp_path / "run", "r", CONFIG, resume=False, command="c", console=Console(io.StringIO()), poll=poll
    )
    with pytest.raises(Interrupted), stopping as run:
        run.once("stage", lambda: b"x", save, load)
    assert load(tmp_path / "run" / "stage") == b"x"


def test_leftovers_of_a_killed_process_are_swept_and_do_not_block(tmp_path):
    (tmp_path / "run" / "engines").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".tmp-run.json-1-ab").write_text("{")
    (tmp_path / "run" / "engines" / ".tmp-x-1-cd").mkdir()
    with opened(tmp_path / "run", resume=True):
        pass
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_a_continued_run_remembers_the_command_that_started_it(tmp_path):
    with opened(tmp_path / "run") as run:
        assert run.origin == "deploy-sparse run r"
    console = Console(io.StringIO())
    with open_run(tmp_path / "run", "r", CONFIG, resume=True, command="other --resume", console=console) as run:
        assert (run.origin, run.command) == ("deploy-sparse run r", "other --resume")


def test_a_row_of_metrics_is_logged_once(tmp_path):
    for resume in (False, True):
        with opened(tmp_path / "run", resume=resume) as run:
            run.log({"epoch": 0})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"epoch": 0}\n'


def test_a_table_that_nothing_depends_on_may_change(tmp_path):
    with opened(tmp_path / "run"):
        pass
    changed = {**CONFIG, "deploy": {"batches": [1]}}
    with opened(tmp_path / "run", resume=True, config=changed, changeable=("deploy",)):
        pass
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"] == changed


def test_a_reader_that_left_does_not_stop_the_work():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    Console(Closed()).say("news")


def test_a_run_of_a_version_with_other_keys_is_told_so(tmp_path):
    with opened(tmp_path / "run"):
        pass
    newer = {"seed": 0, "fit": {"epochs": 3, "check": True}}
    text = r"fit\.check: absent -> True\n.*\n.*if you made none: with the version of deploy_sparse that it was started with"
    with pytest.raises(RunError, match=text), opened(tmp_path / "run", resume=True, config=newer):
        pass
    with (
        pytest.raises(RunError, match=r"drop these changes to continue it, or start a new run"),
        opened(tmp_path / "run", resume=True, config={"seed": 1, "fit": {"epochs": 3}}),
    ):
        pass


def test_a_key_that_nothing_depends_on_may_change_and_its_neighbours_may_not(tmp_path):
    runtime = {"workers": 0, "precision": "fp32"}
    with opened(tmp_path / "run", config={"runtime": runtime}):
        pass
    free = ("runtime.workers",)
    with opened(tmp_path / "run", resume=True, config={"runtime": {**runtime, "workers": 4}}, changeable=free):
        pass
    with (
        pytest.raises(RunError, match=r"another configuration: runtime.precision: fp32 -> bf16\n"),
        opened(tmp_path / "run", resume=True, config={"runtime": {"workers": 4, "precision": "bf16"}}, changeable=free),
    ):
        pass


def test_another_number_of_processes_is_said(tmp_path):
    with opened(tmp_path / "run"):
        pass
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    stream = io.StringIO()
    with opened(tmp_path / "run", resume=True, console=Console(stream)):
        pass
    assert "processes: 2 -> 1" in stream.getvalue()


def test_an_echo_of_a_signal_is_not_a_second_one():
    with Interrupts("again", grace_s=60.0) as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            interrupts.poll()


def test_a_second_signal_acts_at_once():
    program = (
        "import signal, time\n"
        "from deploy_sparse.train.interrupt import Interrupts\n"
        "with Interrupts('again'):\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGTERM


def test_silence_says_nothing(capsys):
    silent = Silence()
    silent.say("news")
    silent.warn("careful")
    with silent.task("training", 1) as progress:
        progress.advance(1)
    assert capsys.readouterr() == ("", "")


def test_reading_a_run_needs_no_torch():
    program = "import sys, deploy_sparse.train.run; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"False\n"
