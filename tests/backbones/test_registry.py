from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxshape.backbones import registry, resnet, vgg
from jaxshape.errors import InputError


def test_networks_are_found_by_name():
  assert set(resnet.VARIANTS) | set(vgg.VARIANTS) <= set(registry.names())
  assert registry.find("resnet18") is resnet
  assert registry.find("vgg16_bn") is vgg


@pytest.mark.parametrize("name", ["resnet8", "vgg11", "efficientnet_lite0"])
def test_each_has_what_is_asked_of_it(name):
  net = registry.make(name, num_classes=3, width=None)
  assert isinstance(net, nn.Module)
  image = jax.ShapeDtypeStruct((1, net.stride, net.stride, 3), jnp.float32)
  variables = jax.eval_shape(
    lambda x: net.init(jax.random.key(0), x, train=False), image
  )
  features = jax.eval_shape(
    lambda v, x: net.apply(v, x, train=False, method="features"),
    variables,
    image,
  )
  assert features.shape[:3] == (1, 1, 1)
  logits = jax.eval_shape(
    lambda v, x: net.apply(v, x, method="head"), variables, features
  )
  assert logits.shape == (1, 3)
  assert logits.dtype == jnp.float32
  head = variables["params"][registry.find(name).HEAD]
  assert head["kernel"].shape[-1] == 3


def test_what_is_not_there_is_refused():
  with pytest.raises(InputError, match="did you mean 'resnet18'"):
    registry.make("resnet-18", num_classes=2)
  with pytest.raises(InputError, match="'vgg16' has no stem, got 'small'"):
    registry.make("vgg16", num_classes=2, stem="small")
