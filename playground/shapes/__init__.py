"""The embedded world: pictures of coloured shapes with known answers, and the pocket models trained on them.

It exists so that every path of the project can run on a bare machine, without a download. Its scores speak of shapes
only: they compare ways of reducing tokens with each other and say nothing about photographs.
"""
