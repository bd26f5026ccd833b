"""How many files a reader must follow from the command to the optimizer (the button: tests/host/test_one_run.py)."""

from files_of_a_step import headless

from distill_core.cli.main import main


def test_from_the_command_to_the_optimizer_few_files_are_open(tmp_path):
    files = headless(main, tmp_path).files("open")
    print(len(files), files)
    assert {"distill_core/cli/train.py", "distill_core/training/run.py", "distill_core/methods/ladd.py"} < set(files)
    assert len(files) <= 10
