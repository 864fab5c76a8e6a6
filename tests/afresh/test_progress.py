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
