"""The modules of torch.nn, with the parameters that torch gives them."""

# pyright: strict

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_inspect.model.shapes.tensors import Parameter, Tensor
from moe_inspect.model.shapes.unknown import Undetermined, Unknown


class Module:
    """What of torch's is used to build a model and to look at it."""

    _parameters: dict[str, Parameter | None]
    _modules: dict[str, Any]
    _buffers: dict[str, Any]

    training = True

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.__dict__.update(_parameters={}, _modules={}, _buffers={})

    def __setattr__(self, name: str, value: Any) -> None:
        # it could be a module with parameters
        if isinstance(value, Unknown) and value.name.startswith("transformers."):
            raise Undetermined(f"{type(self).__name__}.{name} is {value.name}")
        for kind in ("_parameters", "_modules", "_buffers"):
            # numbers may be set before the module is initialised
            self.__dict__.get(kind, {}).pop(name, None)
        self.__dict__.pop(name, None)
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        for kind in ("_parameters", "_modules", "_buffers"):
            if name in self.__dict__.get(kind, ()):
                return self.__dict__[kind][name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def register_parameter(self, name: str, value: Parameter | None) -> None:
        self._parameters[name] = value

    def register_buffer(self, name: str, value: object, persistent: bool = True) -> None:
        self._buffers[name] = value

    def add_module(self, name: str, module: object) -> None:
        if not (module is None or isinstance(module, Module)):
            raise Undetermined(f"a module {name} that is {module!r}")
        self._modules[name] = module

    register_module = add_module

    def named_modules(
        self, memo: set[int] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        memo = set() if memo is None else memo
        if remove_duplicate and id(self) in memo:
            return
        memo.add(id(self))
        yield prefix, self
        for name, module in self.named_children():
            path = f"{prefix}.{name}" if prefix else name
            yield from module.named_modules(memo, path, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        return ((name, m) for name, m in self._modules.items() if m is not None)

    def children(self) -> Iterator[Module]:
        return (module for _, module in self.named_children())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        seen: set[int] = set()
        for path, module in self.named_modules(prefix=prefix) if recurse else [(prefix, self)]:
            for name, parameter in module._parameters.items():
                if parameter is not None and not (remove_duplicate and id(parameter) in seen):
                    seen.add(id(parameter))
                    yield (f"{path}.{name}" if path else name), parameter

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, *args: object, **kwargs: object) -> Iterator[tuple[str, Any]]:
        for path, module in self.named_modules():
            for name, buffer in module._buffers.items():
                yield (f"{path}.{name}" if path else name), buffer

    def get_submodule(self, path: str) -> Any:
        module: Any = self
        for name in path.split(".") if path else ():
            module = module._modules[name]
        return module

    def get_parameter(self, path: str) -> Any:
        parent, _, name = path.rpartition(".")
        return self.get_submodule(parent)._parameters[name]

    def apply(self, function: object) -> Module:
        return self

    def _itself(self, *args: object, **kwargs: object) -> Module:
        return self

    to = eval = train = requires_grad_ = float = half = bfloat16 = cuda = cpu = _itself


class ModuleList(Module):
    def __init__(self, modules: Iterable[object] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def append(self, module: object) -> ModuleList:
        self.add_module(str(len(self._modules)), module)
        return self

    def extend(self, modules: Iterable[object]) -> ModuleList:
        for module in modules:
            self.append(module)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> Any:
        modules = list(self._modules.values())
        return ModuleList(modules[index]) if isinstance(index, slice) else modules[index]


class Sequential(ModuleList):
    def __init__(self, *modules: Any) -> None:
        super().__init__()
        named: Any = modules[0] if len(modules) == 1 else None
        if isinstance(named, Mapping):
            self._modules.update(ModuleDict(named)._modules)  # pyright: ignore[reportUnknownArgumentType]
        else:
            self.extend(modules)


class ModuleDict(Module):
    def __init__(self, modules: Mapping[str, object] | None = None) -> None:
        super().__init__()
        for name, module in (modules or {}).items():
            self.add_module(name, module)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setitem__(self, name: str, module: object) -> None:
        self.add_module(name, module)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def keys(self) -> Iterable[str]:
        return self._modules.keys()

    def values(self) -> Iterable[Any]:
        return self._modules.values()

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._modules.items()


# --- modules with parameters


class _Weighted(Module):
    def _give(self, weight: tuple[int, ...] | None, bias: tuple[int, ...] | None) -> None:
        for name, shape in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if shape is None else Parameter(Tensor(*shape)))


class Linear(_Weighted):
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **options: object
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._give((out_features, in_features), (out_features,) if bias else None)


class Embedding(Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *args: object,
        **options: object,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.weight = Parameter(Tensor(num_embeddings, embedding_dim))


class LayerNorm(_Weighted):
    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        one = isinstance(normalized_shape, int)
        self.normalized_shape = shape = (normalized_shape,) if one else tuple(normalized_shape)
        self.eps = eps
        self._give(
            shape if elementwise_affine else None, shape if elementwise_affine and bias else None
        )


class RMSNorm(LayerNorm):
    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        **options: object,
    ) -> None:
        super().__init__(normalized_shape, eps or 0, elementwise_affine, bias=False)


class GroupNorm(_Weighted):
    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        self._give(*((num_channels,) if affine else None,) * 2)


class BatchNorm(_Weighted):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        self._give(*((num_features,) if affine else None,) * 2)


class _Convolution(_Weighted):
    dimensions = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        one = isinstance(kernel_size, int)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = kernel = (kernel_size,) * self.dimensions if one else tuple(kernel_size)
        self._give(
            (out_channels, in_channels // groups, *kernel), (out_channels,) if bias else None
        )


class Conv1d(_Convolution):
    dimensions = 1


class Conv2d(_Convolution):
    dimensions = 2


class Conv3d(_Convolution):
    dimensions = 3


class MultiheadAttention(Module):
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.in_proj_weight = Parameter(Tensor(3 * embed_dim, embed_dim))
        self.register_parameter("in_proj_bias", Parameter(Tensor(3 * embed_dim)) if bias else None)
        self.out_proj = Linear(embed_dim, embed_dim, bias)


WITHOUT_PARAMETERS = (
    *("Identity", "Dropout", "GELU", "SiLU", "ReLU", "ReLU6", "Sigmoid", "Tanh", "Softmax"),
    *("Softplus", "LeakyReLU", "Mish", "Hardswish", "ELU", "AvgPool1d", "AvgPool2d", "MaxPool2d"),
    *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "PixelShuffle", "PixelUnshuffle", "Unfold"),
    *("Flatten", "Upsample", "ZeroPad2d", "CrossEntropyLoss"),
)


def _buffer(data: object = None, persistent: bool = True) -> object:
    return data


NAMES: dict[str, Any] = {
    **{
        kind.__name__: kind
        for kind in (
            *(Module, Parameter, ModuleList, ModuleDict, Sequential, Linear, Embedding),
            *(LayerNorm, RMSNorm, GroupNorm, Conv1d, Conv2d, Conv3d, MultiheadAttention),
        )
    },
    **{name: type(name, (BatchNorm,), {}) for name in ("BatchNorm1d", "BatchNorm2d")},
    **{name: type(name, (Module,), {}) for name in WITHOUT_PARAMETERS},
    "Buffer": _buffer,
}
