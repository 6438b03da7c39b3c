"""Convert variables from and to PyTorch, Keras 3, dm-haiku and equinox.

None of these libraries is imported: their arrays are read through `__array__`, on the
host, and copied. A layer is a pair `(params, state)`, as `jaxbn.batch_norm` takes it.

| library | one layer | a whole model, by a map of names |
|---|---|---|
| PyTorch | `from_torch`, `to_torch` | `from_torch_tree`, `to_torch_tree` |
| Keras 3 | `from_keras`, `to_keras` | `from_keras_tree`, `to_keras_tree` |
| dm-haiku | `from_haiku`, `to_haiku` | `from_haiku_tree`, `to_haiku_tree` |
| equinox | `from_equinox`, `to_equinox` | `from_equinox_tree`, `to_equinox_tree` |
| linen, nnx | `layers_of` | `replace_layers` |

**Names of the variables**

| jaxbn, Flax | PyTorch | Keras | haiku | equinox |
|---|---|---|---|---|
| `scale` | `weight` | `gamma` | `scale` | `weight` |
| `bias` | `bias` | `beta` | `offset` | `bias` |
| `mean` | `running_mean` | `moving_mean` | `mean_ema/average` | in the state |
| `var` | `running_var` | `moving_variance` | `var_ema/average` | in the state |
| `count` (Flax: none) | `num_batches_tracked` | | `mean_ema/counter` | with "batch" |
| shape (C,) | (C,) | (C,) | (1, ..., C) | (C,) |
| without scale or bias | `affine` | `scale`, `center` | `create_*` | `*_affine` |

**Options are in no checkpoint: pass them to jaxbn's layer**

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

**Whole models.** `names` maps the library's name of each batch norm layer to the
layer's path in the Flax variables, in both directions. The path has no collection and
no variable: `"Block_0/BatchNorm_0"` in linen variables, `"blocks/0/norm"` in an
`nnx.State`. "." is accepted for "/" there; PyTorch's names keep their ".".

The result is a new tree in which the values of the layers are replaced, in the dtypes
of the old ones. An error changes nothing:

- `ValueError`: a name that is not in the source or not in the target, a layer that the
  map leaves out or gives twice, feature counts that disagree, a scale or bias on one
  side only, a running variance that is negative or NaN;
- `TypeError`: values that are not floating.

>>> import numpy as np, jaxbn
>>> state_dict = {"bn.weight": np.array([1.0, 2.0]), "bn.bias": np.array([3.0, 4.0]),
...     "bn.running_mean": np.array([5.0, 6.0]), "bn.running_var": np.array([7.0, 8.0]),
...     "bn.num_batches_tracked": np.array(9), "fc.weight": np.zeros((2, 2))}
>>> ones = np.ones(2, np.float32)
>>> variables = {
...     "batch_stats": {"BatchNorm_0": {"mean": ones, "var": ones}},
...     "params": {"BatchNorm_0": {"scale": ones, "bias": ones},
...                "Dense_0": {"bias": ones}}}
>>> jaxbn.convert.from_torch_tree(state_dict, {"bn": "BatchNorm_0"}, variables)
{'batch_stats': {'BatchNorm_0': {'mean': array([5., 6.], dtype=float32),
                                 'var': array([7., 8.], dtype=float32)}},
 'params': {'BatchNorm_0': {'bias': array([3., 4.], dtype=float32),
                            'scale': array([1., 2.], dtype=float32)},
            'Dense_0': {'bias': array([1., 1.], dtype=float32)}}}
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
