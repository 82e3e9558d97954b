"""GPT-2 as pure functions over a flat dict of parameters.

`forward` embeds the tokens, applies `transformer_block` n_layers times and scores every vocabulary entry as the next
token. The function of a layer gets all the parameters and a `prefix`, such as "trf_blocks.3.att", with which the names
of its own begin. The same arguments give the same result. Only two are ever changed: a `generator` by drawing from it,
and a `cache` by writing into it.

Axes, one letter each: B batch, T tokens, V vocabulary, E embedding, H heads, D head size (E = H * D).
"""
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from operator import ge, gt, lt
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Params = dict[str, Tensor]  # the names are those of the chapter's state_dict
EMBEDDINGS = ("tok_emb.weight", "pos_emb.weight")  # tables: their rows are looked up, not multiplied
QUERY_KEY_VALUE = ("W_query", "W_key", "W_value")


# Settings
TESTS: dict[str, Any] = {"at_least": ge, "above": gt, "below": lt, "one_of": lambda value, choices: value in choices}


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field of a dataclass of settings: its default, what it is, and what its values must be."""
    return field(default=default, metadata={"help": help, "bounds": bounds})


def kind_of(setting: Field[Any]) -> Any:
    """The type of one value of a setting: int, also for `int | None` and `tuple[int, ...]`."""
    return (*get_args(setting.type), setting.type)[0]


class Checked:
    """The base of dataclasses of settings: a value of another type, out of bounds or empty raises a ValueError."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            kind, bounds, value = kind_of(each), each.metadata["bounds"], getattr(self, each.name)
            types = {float: (float, int), str: (str, Path)}.get(kind, (kind,))  # an int is a float, too
            is_list = isinstance(value, (tuple, list))
            is_right = is_list == isinstance(each.default, tuple) and all(
                isinstance(one, types) and isinstance(one, bool) == (kind is bool) and one != ""
                and all(TESTS[name](one, bounds[name]) for name in bounds) for one in (value if is_list else [value]))
            if not (is_right or value is each.default):  # a default, also None, is right as it is
                words = "".join(f", {name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise ValueError(f"{each.name} must be of type {kind.__name__}{words}, not {value!r}")


@dataclass(frozen=True)
class Config(Checked):
    """The shape of a model, by default the chapter's while it trains (section 5.1.1); ValueError for nonsense."""
    vocab_size: int = option(50257, "tokens in the vocabulary", at_least=1)
    context_length: int = option(256, "the most tokens that the model sees at once", at_least=1)
    emb_dim: int = option(768, "size of the embeddings", at_least=1, below=2**16)
    n_heads: int = option(12, "attention heads; a fresh model has one for each 64 of emb_dim", at_least=1)
    n_layers: int = option(12, "transformer blocks", at_least=1, below=2**16)
    drop_rate: float = option(0.1, "probability that dropout zeroes a value, while training", at_least=0, below=1)
    qkv_bias: bool = option(False, "whether query, key and value have a bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} must be a multiple of n_heads {self.n_heads}")


GPT_CONFIG_124M = Config()


# Parameters
def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter, in the order in which the chapter's model registers them."""
    V, T, E = config.vocab_size, config.context_length, config.emb_dim
    layers = {f"att.{name}": (E, E) for name in (*QUERY_KEY_VALUE, "out_proj")}
    layers |= {"ff.layers.0": (4 * E, E), "ff.layers.2": (E, 4 * E)}
    block: dict[str, tuple[int, ...]] = {}
    for layer, (fan_out, fan_in) in layers.items():
        block[f"{layer}.weight"] = (fan_out, fan_in)
        if config.qkv_bias or "W_" not in layer:
            block[f"{layer}.bias"] = (fan_out,)
    block |= {f"{norm}.{name}": (E,) for norm in ("norm1", "norm2") for name in ("scale", "shift")}
    blocks = {f"trf_blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()}
    return {"tok_emb.weight": (V, E), "pos_emb.weight": (T, E)} | blocks | {
        "final_norm.scale": (E,), "final_norm.shift": (E,), "out_head.weight": (V, E)}


def init_params(config: Config, generator: Generator) -> Params:
    """Fresh float32 parameters, drawn as `nn.Embedding` and `nn.Linear` draw theirs (section 5.1.1).

    Embeddings are standard normal, linear layers uniform on +-1/sqrt(fan_in), norms change nothing. A generator with
    seed 123 gives the parameters of the chapter's model after `torch.manual_seed(123)`.
    """
    params, shapes = {}, param_shapes(config)
    for name, shape in shapes.items():
        params[name] = tensor = torch.empty(shape, dtype=torch.float32, device=generator.device)
        if name in EMBEDDINGS:
            tensor.normal_(generator=generator)
        elif "norm" in name:
            tensor.fill_(1 if name.endswith("scale") else 0)
        else:
            fan_in = shapes[name.replace(".bias", ".weight")][1]
            tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return params


def map_params(function: Callable[[Tensor], Any], params: Params) -> dict[str, Any]:
    """function(tensor) under each name, called once for each tensor.

    OpenAI's models have one tensor under two names, tok_emb.weight and out_head.weight. Such tied parameters stay tied
    here, because a dict finds a tensor by its identity, not by its values.
    """
    results = {tensor: function(tensor) for tensor in distinct(params)}
    return {name: results[tensor] for name, tensor in params.items()}


def distinct(params: Params) -> list[Tensor]:
    """The tensors of the parameters in their order, a tied one once."""
    return list(dict.fromkeys(params.values()))


def compute_in(params: Params, dtype: torch.dtype) -> Params:
    """The parameters in the type of the computation; in float32, the chapter's, nothing changes.

    The EMBEDDINGS keep their type, because only a few of their rows are used at a time: `hidden_states` converts those.
    A tied output head becomes a tensor of its own; the gradients of both uses still add up in the shared one.
    """
    return {name: tensor if name in EMBEDDINGS else tensor.to(dtype) for name, tensor in params.items()}


# The layers
def linear(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (B, T, fan_in) times the transposed weight (fan_out, fan_in), plus the bias if there is one: (B, T, fan_out).

    It is F.linear, or what does the same faster. `outputs`, which chooses, is the one name that is used above the line
    where the chapter ends and defined below it.
    """
    return outputs(x, params, prefix)[0]


def layer_norm(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (..., E) with mean 0 and variance 1 along its last axis, then scaled and shifted."""
    return F.layer_norm(x, x.shape[-1:], params[f"{prefix}.scale"], params[f"{prefix}.shift"], eps=1e-5)


def dropout(x: Tensor, rate: float, generator: Generator | None) -> Tensor:
    """x with each value zeroed with probability `rate` and the others divided by 1 - rate; without a generator just x.

    It draws what F.dropout draws, which can do so from PyTorch's global generator only.
    """
    if generator is None or rate == 0:
        return x
    return torch.empty_like(x).bernoulli_(1 - rate, generator=generator).div_(1 - rate) * x


class Cache(NamedTuple):
    """Keys and values of the tokens that were read so far, so that a new token needs only its own.

    The buffer is (n_layers, 2, B, H, room, D), where 2 is keys and values; a layer gets its part, (2, B, H, room, D).
    There is room for `room` tokens, and `length` of them are in it.
    """
    buffer: Tensor
    length: int


def attention(x: Tensor, params: Params, prefix: str, config: Config, generator: Generator | None = None,
              cache: Cache | None = None) -> Tensor:
    """Causal multi-head attention over x (B, T, E): (B, T, E).

    With a cache, x holds the tokens after the cached ones, attends to those too, and is added to the cache's buffer.
    """
    B, T, E = x.shape
    H, D = config.n_heads, E // config.n_heads
    layers = outputs(x, params, *(f"{prefix}.{name}" for name in QUERY_KEY_VALUE))  # `linear` for each of the three
    q, k, v = (output.view(B, T, H, D).transpose(1, 2) for output in layers)  # (B, H, T, D)
    if cache is not None:
        end = cache.length + T
        cache.buffer[0, :, :, cache.length:end] = k
        cache.buffer[1, :, :, cache.length:end] = v
        k, v = cache.buffer[0, :, :, :end], cache.buffer[1, :, :, :end]  # (B, H, end, D)
    if generator is None or config.drop_rate == 0:
        # softmax(q k^T / sqrt(D)) v in one call. After cached tokens comes a single one, which may attend to all.
        context = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None or cache.length == 0)
    else:
        # The same by hand, because that call can't draw its dropout from our generator. The numbers are the chapter's,
        # which divides the scores by sqrt(64) = 8 (here q is multiplied by 1/8, which is exact), and replaces those of
        # later tokens by -inf (here it is added to them).
        later = torch.full((T, T), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        scores = (q * D**-0.5) @ k.transpose(2, 3) + later  # (B, H, T, T)
        context = dropout(scores.softmax(-1), config.drop_rate, generator) @ v
    return linear(context.transpose(1, 2).reshape(B, T, E), params, f"{prefix}.out_proj")


def feed_forward(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (B, T, E) through E -> 4 E -> E, with GELU in its tanh form between: (B, T, E)."""
    return linear(F.gelu(linear(x, params, f"{prefix}.0"), approximate="tanh"), params, f"{prefix}.2")


def transformer_block(x: Tensor, params: Params, prefix: str, config: Config, generator: Generator | None = None,
                      cache: Cache | None = None) -> Tensor:
    """x (B, T, E) plus what attention adds to it, then plus what the feed-forward network adds: (B, T, E)."""
    attended = attention(layer_norm(x, params, f"{prefix}.norm1"), params, f"{prefix}.att", config, generator, cache)
    x = x + dropout(attended, config.drop_rate, generator)
    fed = feed_forward(layer_norm(x, params, f"{prefix}.norm2"), params, f"{prefix}.ff.layers")
    return x + dropout(fed, config.drop_rate, generator)


# The model
def hidden_states(params: Params, token_ids: Tensor, config: Config, generator: Generator | None = None,
                  cache: Cache | None = None) -> Tensor:
    """What the last block makes of the tokens (B, T), which follow those in the cache, if there is one: (B, T, E)."""
    _, T = token_ids.shape
    start, room = (0, config.context_length) if cache is None else (cache.length, cache.buffer.shape[-2])
    if T == 0 or start + T > room or (start > 0 and T > 1):
        raise ValueError(f"{T} tokens after {start}: 1 to {room} are needed in all, and after a first call 1 at a time")
    x = F.embedding(token_ids, params["tok_emb.weight"]) + params["pos_emb.weight"][start:start + T]
    # The embeddings may have another type than the rest, which has that of final_norm.scale: see `compute_in`.
    x = dropout(x, config.drop_rate, generator).to(params["final_norm.scale"].dtype)
    for i in range(config.n_layers):
        layer_cache = None if cache is None else Cache(cache.buffer[i], cache.length)
        x = transformer_block(x, params, f"trf_blocks.{i}", config, generator, layer_cache)
    return x


def output_logits(x: Tensor, params: Params) -> Tensor:
    """The logits (B, T, V) of hidden states x (B, T, E), in float32, or in float64 if the parameters are."""
    logits = linear(layer_norm(x, params, "final_norm"), params, "out_head")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # the wider of the two types


def forward(params: Params, token_ids: Tensor, config: Config, generator: Generator | None = None) -> Tensor:
    """Logits (B, T, V): row t scores every vocabulary entry as the token after token_ids[:, :t + 1] (section 5.1.1).

    token_ids (B, T) are integers below V. There is dropout, at config.drop_rate, exactly when a generator is passed.
    ValueError when token_ids has not two axes, or no tokens, or more than context_length.
    """
    return output_logits(hidden_states(params, token_ids, config, generator), params)


def calc_loss(params: Params, inputs: Tensor, targets: Tensor, config: Config,
              generator: Generator | None = None) -> Tensor:
    """The mean cross-entropy of the targets (B, T) given the inputs (B, T): a scalar (section 5.1.2).

    It is the mean of -ln(p), where p is the probability of the right token; exp(loss) is the perplexity.
    """
    logits = forward(params, inputs, config, generator)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B * T, V) and (B * T,)


def empty_cache(params: Params, batch_size: int, room: int, config: Config) -> Cache:
    """A cache without tokens, with room for `room` of them, but at most context_length, in each of batch_size rows."""
    room = min(room, config.context_length)
    shape = (config.n_layers, 2, batch_size, config.n_heads, room, config.emb_dim // config.n_heads)
    return Cache(params["final_norm.scale"].new_empty(shape), 0)


def extend(params: Params, token_ids: Tensor, config: Config, cache: Cache) -> tuple[Tensor, Cache]:
    """The last row of logits (B, 1, V) after the cached tokens and then token_ids (B, T), and the longer cache.

    An empty cache takes a whole prompt, a longer one one token at a time; ValueError for another number, or without
    room. The buffer is written into: go on with the cache that is returned.
    """
    x = hidden_states(params, token_ids, config, cache=cache)
    return output_logits(x[:, -1:], params), Cache(cache.buffer, cache.length + x.shape[1])


# ---- The chapter ends here. What follows makes it fast: which library multiplies, how weights lie in memory. ----

# For float32 PyTorch takes MKL, which is Intel's and the fastest on Intel's processors. On others oneDNN is faster, for
# a single token and, with AVX-512, for 16 and more. It is within PyTorch too, also under its old name, mkldnn. For 2 to
# 15 tokens the two are about as fast, and MKL has the last digits that section 5.1.2 prints.
PROCESSOR, VECTORS = torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability()
AMX = bool(PROCESSOR.get("amx_bf16"))  # Intel's units for whole matrices in bfloat16
ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build of PyTorch
ONEDNN_FASTER = ONEDNN and VECTORS in ("AVX2", "AVX512") and not str(PROCESSOR.get("cpu_name")).startswith("Intel")


def outputs(x: Tensor, params: Params, *prefixes: str) -> tuple[Tensor, ...]:
    """For each prefix the output of that linear layer, given x: see `linear`. `pack` may have joined the layers."""
    joined = "+".join(prefixes)
    names = (joined,) if f"{joined}.weight" in params else prefixes
    results = tuple(fast_linear(x, params[f"{name}.weight"], params.get(f"{name}.bias")) for name in names)
    return results if len(results) == len(prefixes) else results[0].chunk(len(prefixes), -1)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), by what was measured to be the fastest. x is (B, T, fan_in)."""
    if weight.is_mkldnn:  # `pack` made it so
        return onednn_product(x, weight, bias)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    if AMX and x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]:  # one row: AMX is for many
        return (weight.mv(x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())).view(1, 1, -1)
    if ONEDNN_FASTER and x.dtype == torch.float32 and (x.shape[1] == 1 or (x.shape[1] >= 16 and VECTORS == "AVX512")):
        # Where no gradient is wanted, the detour over autograd would only cost time.
        return (onednn_product if x.is_inference() and not weight.requires_grad else onednn_linear)(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), by oneDNN. PyTorch has no gradient for it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class OneDNNLinear(torch.autograd.Function):
    """`onednn_product` with its gradient, which is made of the same products, and so has a gradient in turn."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight, bias = ctx.saved_tensors
        rows, x_rows = gradient.flatten(0, -2), x.flatten(0, -2)  # (B * T, fan_out) and (B * T, fan_in)
        return (onednn_linear(gradient, weight.t(), None),
                onednn_linear(rows.t(), x_rows.t(), None),
                None if bias is None else rows.sum(0))


onednn_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = OneDNNLinear.apply


def pack(params: Params) -> Params:
    """The parameters as they are read faster: on a CPU a token takes 7 to 50 % less time, packing as long as two.

    Query, key and value of each block become one layer. Where the processor has instructions for bfloat16, but no AMX,
    its matrices get the layout in which oneDNN reads them twice as fast; for float32 that would not pay.
    """
    packed = dict(params)
    for query in [name for name in params if ".W_query." in name]:
        prefix, kind = query.split(".W_query.")  # kind is weight or bias
        names = [f"{prefix}.{name}" for name in QUERY_KEY_VALUE]
        packed[f"{'+'.join(names)}.{kind}"] = torch.cat([packed.pop(f"{name}.{kind}") for name in names])
    if ONEDNN and torch.backends.mkldnn.enabled and not AMX and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for name, tensor in packed.items():
            if tensor.is_cpu and tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and name not in EMBEDDINGS:
                packed[name] = torch.ops.mkldnn._reorder_linear_weight(tensor, 1)  # for 1 token at a time
    return packed
