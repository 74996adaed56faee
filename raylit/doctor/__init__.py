"""Whether a machine or a cluster can train: checks before a long job. Floor 6.

``examine.py`` (driver) asks, ``node.py`` is what each node does, ``judge.py`` and ``network.py`` say what the answers
mean: pure functions, from facts to rows.
"""
