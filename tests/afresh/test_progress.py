"""Progress and messages where there is no terminal, and where several processes run."""

from __future__ import annotations

from afresh import progress


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    assert list(progress.progress([1, 2, 3], desc="embedding", unit="images")) == [1, 2, 3]
    with progress.progress(total=4, desc="reading", unit="shards") as bar:
        bar.update(2)
    err = capsys.readouterr().err
    assert "embedding: 3/3 images" in err and "reading: 2/4 shards" in err and "\r" not in err


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    assert list(progress.progress(range(3), desc="embedding", unit="images")) == [0, 1, 2]
    log = progress.get_logger("curate.test")
    log.info("said by all")
    log.warning("seen by one")
    assert capsys.readouterr().err == "warning: seen by one\n"


def test_a_name_in_a_message_does_not_steer_the_terminal(capsys):
    progress.get_logger("curate.test").warning("%s (left out)\nand another line", "\x1b[2J\u202e\x9b")
    assert capsys.readouterr().err == "warning: \\x1b[2J\\u202e\\x9b (left out)\nand another line\n"


def test_what_takes_longer_than_a_second_is_told_in_seconds_a_unit(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress(total=4, desc="training", unit="steps") as bar:
        now[0] = 109.2
        bar.update(2)
    assert "training: 2/4 steps, 54.6 s a step, 109 s" in capsys.readouterr().err
    now[0] = 0.0
    with progress.progress(total=40, desc="explain", unit="trajectories") as bar:
        now[0] = 20.0
        bar.update(30)
    assert "30/40 trajectories, 1.5/s, 20 s, 7 s left" in capsys.readouterr().err


def test_what_happens_within_a_long_unit_is_said_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress(total=2, desc="localizing", unit="prompts") as bar:
        for second in range(0, 35, 5):
            now[0] = float(second)
            bar.set_postfix_str(f"{second} evaluations")
        lines = capsys.readouterr().err.splitlines()
        bar.update()
    assert [line.rpartition(", ")[2] for line in lines] == ["10 evaluations", "20 evaluations", "30 evaluations"]
    assert lines[0] == "localizing: 0/2 prompts, 10 s, 10 evaluations"
