"""The embedded world: images of coloured shapes with known answers, and the pocket models trained on them.

It lets every part of the project run on any machine, without a download. Its scores are about shapes only: they compare
token reductions with each other and say nothing about photographs.
"""
