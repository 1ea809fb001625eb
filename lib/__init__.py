"""The shared library of *Convergence, Executed*: the trainers, the mathematics and the ledger behind the chapters."""
