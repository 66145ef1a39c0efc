"""Damaged, odd and hostile inputs by the thousand: ``python -m tests.fuzz`` (``make fuzz``).

Every case makes a small right input, changes it, and runs the real function through ``cli.run_command`` in a forked
child. It must end in one of two ways: success whose output means what the input says, or an error that names the file,
row or key. What "means what the input says" is, the oracle, stands in the module of each kind of case:

raw      preparation; ``reference.py`` is a second reader of the raw files, written apart from the first
config   configs and overrides; a value must be what its text says, and no other setting may move
shards   shards, manifests, histories; samples that are read equal those that were written
models   bases, adapters, checkpoints; scores equal those of the undamaged folder
server   replies of an OpenAI-compatible server, through whole jobs; a text that is kept was sent whole
"""
