"""Damaged and hostile files, made from a seed, for every reader of files: a valid result or one sentence, at once.

A few of them run with the tests (`tests/test_fuzz.py`); many by hand, with a summary at the end:

    python -m tests.fuzz --inputs=20000 --seed=1

files.py makes valid files, mutate.py damages them, hostile.py has files that were thought of, readers.py reads all;
run.py does so in a process of its own, with limits for each.
"""
