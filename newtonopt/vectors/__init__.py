"""Flat vectors: all parameters, or their gradients, one after the other.

- `flat`: from parameters to a flat vector and back.
- `sharded`: flat vectors of which each process holds a slice, and the parameters of `fully_shard` that they come from.
- `processes`: the processes of `torch.distributed`, and what they exchange.
- `scaling`: norms and products of vectors whose squares would leave the range of their dtype.
- `subclasses`: subclasses of `torch.Tensor` that closures compute with.
- `memory`: whether a vector or a matrix would fit.

`flat` calls `sharded` for parameters that are shards, and that calls `subclasses`. The others stand alone.
"""
