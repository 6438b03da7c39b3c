"""Convert variables from and to PyTorch, Keras 3, dm-haiku and equinox.

None of these libraries is imported: their arrays are read through `__array__`, on the
host, and copied. One batch norm is a pair `(params, state)`, as `jaxbn.batch_norm`
takes it. A whole model is converted by a map of names: its batch norms, and the
weights of the other layers that the map names.

| library | one batch norm | a whole model, by a map of names |
|---|---|---|
| PyTorch | `from_torch`, `to_torch` | `from_torch_tree`, `to_torch_tree` |
| Keras 3 | `from_keras`, `to_keras` | `from_keras_tree`, `to_keras_tree` |
| dm-haiku | `from_haiku`, `to_haiku` | `from_haiku_tree`, `to_haiku_tree` |
| equinox | `from_equinox`, `to_equinox` | `from_equinox_tree`, `to_equinox_tree` |
| linen, nnx | `layers_of` | `replace_layers` |

**Batch norms: names of the variables**

| jaxbn, Flax | PyTorch | Keras | haiku | equinox |
|---|---|---|---|---|
| `scale` | `weight` | `gamma` | `scale` | `weight` |
| `bias` | `bias` | `beta` | `offset` | `bias` |
| `mean` | `running_mean` | `moving_mean` | `mean_ema/average` | in the state |
| `var` | `running_var` | `moving_variance` | `var_ema/average` | in the state |
| `count` (Flax: none) | `num_batches_tracked` | | `mean_ema/counter` | with "batch" |
| shape (C,) | (C,) | (C,) | (1, ..., C) | (C,) |
| without scale or bias | `affine` | `scale`, `center` | `create_*` | `*_affine` |

**Batch norms: options are in no checkpoint; pass them to jaxbn's layer**

| option | jaxbn | Flax | PyTorch | Keras | haiku | equinox |
|---|---|---|---|---|---|---|
| `momentum` | 0.99 | 0.99 | 0.1, jaxbn's 0.9 | 0.99 | `decay_rate` | 0.99 |
| `epsilon` | 1e-5 | 1e-5 | 1e-5 | **1e-3** | 1e-5 | 1e-5 |
| `unbiased` | True | False | True | False | False | False |
| `axis` | -1 | -1 | 1 | -1 | -1 | 1, after vmap |
| debiased averages | no | no | no | no | yes | "batch" |

`torch_momentum` translates PyTorch's momentum, and `debiased_momentum` the debiased
averages of haiku and equinox. `from_haiku` and `from_equinox` list their differences
from jaxbn.

**Other layers: names and shapes of the weights**

| layer | Flax | PyTorch, equinox | Keras | haiku |
|---|---|---|---|---|
| convolution | `kernel` `(*k, I/g, O)` | `weight` `(O, I/g, *k)` | `kernel` | `w` |
| depthwise | `kernel` `(*k, 1, C*m)` | `weight` `(C*m, 1, *k)` | `(*k, C, m)` | `w` |
| dense | `kernel` `(I, O)` | `weight` `(O, I)` | `kernel` | `w` |
| | `bias` `(O,)` | `bias`; equinox: `(O, 1, ...)` | `bias` | `b` |
| another norm | `scale` `(C,)` | `weight` | `gamma` | `scale` |
| | `bias` `(C,)` | `bias` | `beta` | `offset` |
| embedding | `embedding` `(N, D)` | `weight` | `embeddings` | `embeddings` |

`*k` are one, two or three spatial axes, g the groups, m the multiplier. Shapes that are
not given are Flax's. The variables of the Flax layer tell how the weights are
converted: PyTorch's `weight` becomes a `kernel`, a `scale` or an `embedding`. Layer,
group and instance norms are other norms, and so are batch norms without running
statistics. Recurrent layers and attention are not converted as one layer.

Two mistakes can have the right shapes, and are then not detected:

- **Transposed convolutions.** PyTorch and Keras reverse the spatial axes. Their kernels
  fit Flax's `ConvTranspose` with `transpose_kernel=True`, and equinox's the default,
  `False`. Otherwise, and from haiku, convert the kernel by hand.
- **A dense layer after flattening.** PyTorch flattens (C, H, W), Flax (H, W, C). The
  rows of the kernel must be permuted by hand:
  `kernel.reshape(C, H, W, O).transpose(1, 2, 0, 3).reshape(H * W * C, O)`.

**Whole models.** `names` maps the library's name of each layer to the layer's path in
the Flax variables, in both directions. Every batch norm must be named; another layer is
copied if it is named, and else left as it is. The path has no collection and no
variable: `"Block_0/BatchNorm_0"` in linen variables, `"blocks/0/norm"` in an
`nnx.State`. "." is accepted for "/" there; PyTorch's names keep their ".".

The result is a new tree in which the values of the layers are replaced, in the dtypes
of the old ones. An error changes nothing:

- `ValueError`: a name that is not in the source or not in the target, a batch norm that
  the map leaves out, a layer that it gives twice, a batch norm mapped to another kind
  of layer or the reverse, shapes that disagree in Flax's layout, a kernel, scale or
  bias on one side only, a running variance that is NaN, or negative although epsilon
  is added: the library's default in the table above, in equinox the layer's own;
- `TypeError`: values that are not floating.

>>> import jax, numpy as np, jaxbn
>>> state_dict = {"conv.weight": np.ones((4, 3, 5, 5)), "bn.weight": np.ones(4),
...     "bn.bias": np.zeros(4), "bn.running_mean": np.array([5.0, 6.0, 7.0, 8.0]),
...     "bn.running_var": np.ones(4), "bn.num_batches_tracked": np.array(9),
...     "fc.weight": np.ones((2, 4)), "fc.bias": np.zeros(2)}
>>> old = np.ones(4, np.float32)
>>> variables = {
...     "batch_stats": {"BatchNorm_0": {"mean": old, "var": old}},
...     "params": {"BatchNorm_0": {"scale": old, "bias": old},
...                "Conv_0": {"kernel": np.zeros((5, 5, 3, 4), np.float32)},
...                "Dense_0": {"kernel": np.zeros((4, 2)), "bias": np.zeros(2)}}}
>>> names = {"conv": "Conv_0", "bn": "BatchNorm_0", "fc": "Dense_0"}
>>> new = jaxbn.convert.from_torch_tree(state_dict, names, variables)
>>> new["batch_stats"]["BatchNorm_0"]["mean"]
array([5., 6., 7., 8.], dtype=float32)
>>> jax.tree.map(np.shape, new["params"])
{'BatchNorm_0': {'bias': (4,), 'scale': (4,)},
 'Conv_0': {'kernel': (5, 5, 3, 4)},
 'Dense_0': {'bias': (2,), 'kernel': (4, 2)}}
>>> back = jaxbn.convert.to_torch_tree(new, names, state_dict)
>>> back["conv.weight"].shape, bool((back["conv.weight"] == 1).all())
((4, 3, 5, 5), True)
"""

from ._equinox import from_equinox as from_equinox
from ._equinox import from_equinox_tree as from_equinox_tree
from ._equinox import to_equinox as to_equinox
from ._equinox import to_equinox_tree as to_equinox_tree
from ._flax import layers_of as layers_of
from ._flax import replace_layers as replace_layers
from ._haiku import from_haiku as from_haiku
from ._haiku import from_haiku_tree as from_haiku_tree
from ._haiku import to_haiku as to_haiku
from ._haiku import to_haiku_tree as to_haiku_tree
from ._keras import from_keras as from_keras
from ._keras import from_keras_tree as from_keras_tree
from ._keras import to_keras as to_keras
from ._keras import to_keras_tree as to_keras_tree
from ._momentum import debiased_momentum as debiased_momentum
from ._momentum import torch_momentum as torch_momentum
from ._torch import from_torch as from_torch
from ._torch import from_torch_tree as from_torch_tree
from ._torch import to_torch as to_torch
from ._torch import to_torch_tree as to_torch_tree
