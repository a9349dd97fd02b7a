"""Describes a model of transformers without torch: the model's own code builds it from modules and
tensors that have a shape and no data. That takes a third of the time, most of which goes into
importing torch.

Nothing is guessed. A value that is not known here is an `Unknown`: a size, a branch or a module
that depends on one ends the attempt, and the model is built with torch. The stand-ins replace
modules of the whole process, so this is done in a process of its own (`__main__.py`).
"""
