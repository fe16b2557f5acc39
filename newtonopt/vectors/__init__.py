"""Flat vectors: all parameters, or their gradients, one after the other.

- `flat`: from parameters to a flat vector and back; which parameters can share one flat vector.
- `sharded`: models sharded by `fully_shard` (FSDP2), and flat vectors of which each process holds a slice.
- `processes`: the processes of `torch.distributed`, and what they exchange.
- `random`: the vectors to multiply a matrix by, random ones and unit vectors.
- `scaling`: norms and products of vectors whose squares would leave the range of their dtype.
- `subclasses`: subclasses of `torch.Tensor` that closures compute with.
- `memory`: whether a vector or a matrix would fit.

`flat` and `random` call `sharded` for sharded parameters, and that calls `subclasses`. The others stand alone.
"""
