"""The arithmetic of the benchmarks: pure functions of strings and numbers, standard library only."""
