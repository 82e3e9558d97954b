"""GPT-2 as pure functions over a flat dict of parameters.

`forward` embeds the tokens, applies `transformer_block` n_layers times and scores every vocabulary entry as the next
token. The function of a layer gets all the parameters and a `prefix`, such as "trf_blocks.3.att", that tells which of
them are its own; in a module `self` does so.

Nothing is remembered between calls: the same arguments give the same result. Two kinds of arguments change, and their
names are always the same: drawing moves a `generator` on, and a `cache` is written into.

Axes, one letter each: B batch, T tokens, V vocabulary, E embedding, H heads, D head size (E = H * D).
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]  # the names are those of the chapter's state_dict
EMBEDDINGS = ("tok_emb.weight", "pos_emb.weight")  # tables: their rows are looked up, not multiplied

QUERY_KEY_VALUE = ("W_query", "W_key", "W_value")


@dataclass(frozen=True)
class Config:
    """The shape of a model. A value that makes no sense raises a ValueError that names its field (section 5.1.1)."""
    vocab_size: int
    context_length: int  # the most tokens that the model sees at once
    emb_dim: int
    n_heads: int
    n_layers: int
    drop_rate: float     # probability that dropout zeroes a value, while training
    qkv_bias: bool       # whether query, key and value have a bias

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} must be a multiple of n_heads {self.n_heads}")
        if not isinstance(self.drop_rate, (int, float)) or not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and less than 1, not {self.drop_rate!r}")
        if not isinstance(self.qkv_bias, bool):
            raise ValueError(f"qkv_bias must be True or False, not {self.qkv_bias!r}")


GPT_CONFIG_124M = Config(vocab_size=50257, context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1,
                         qkv_bias=False)


# Parameters

def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter, in the order in which the chapter's model registers them."""
    V, E = config.vocab_size, config.emb_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (V, E), "pos_emb.weight": (config.context_length, E)}
    for i in range(config.n_layers):
        block = f"trf_blocks.{i}"
        for layer, fan_out, fan_in, has_bias in (
                ("att.W_query", E, E, config.qkv_bias),
                ("att.W_key", E, E, config.qkv_bias),
                ("att.W_value", E, E, config.qkv_bias),
                ("att.out_proj", E, E, True),
                ("ff.layers.0", 4 * E, E, True),
                ("ff.layers.2", E, 4 * E, True)):
            shapes[f"{block}.{layer}.weight"] = (fan_out, fan_in)
            if has_bias:
                shapes[f"{block}.{layer}.bias"] = (fan_out,)
        for norm in ("norm1", "norm2"):
            shapes[f"{block}.{norm}.scale"] = shapes[f"{block}.{norm}.shift"] = (E,)
    shapes["final_norm.scale"] = shapes["final_norm.shift"] = (E,)
    shapes["out_head.weight"] = (V, E)
    return shapes


def init_params(config: Config, generator: torch.Generator) -> Params:
    """Fresh float32 parameters, drawn as `nn.Embedding` and `nn.Linear` draw theirs (section 5.1.1).

    Embeddings are standard normal, linear layers uniform on +-1/sqrt(fan_in), norms change nothing. They are drawn in
    the order of `param_shapes`: a generator with seed 123 gives the chapter's model after `torch.manual_seed(123)`.
    """
    params, shapes = {}, param_shapes(config)
    for name, shape in shapes.items():
        if name.endswith("scale"):
            params[name] = torch.ones(shape)
        elif name.endswith("shift"):
            params[name] = torch.zeros(shape)
        elif name in EMBEDDINGS:
            params[name] = torch.empty(shape).normal_(generator=generator)
        else:
            fan_in = shapes[name.replace(".bias", ".weight")][1]
            params[name] = torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return params


def map_params(function: Callable[[Tensor], Any], params: Params) -> dict[str, Any]:
    """function(tensor) under each name, called once for each tensor.

    In OpenAI's models two names, tok_emb.weight and out_head.weight, have one tensor: they are tied, and stay tied
    here. This works because a dict tells tensors apart by which object they are, not by what is in them.
    """
    results = {tensor: function(tensor) for tensor in distinct(params)}
    return {name: results[tensor] for name, tensor in params.items()}


def distinct(params: Params) -> list[Tensor]:
    """The tensors of the parameters in their order, a tied one once."""
    return list(dict.fromkeys(params.values()))


def compute_in(params: Params, dtype: torch.dtype) -> Params:
    """The parameters, cast to dtype for the computation, all but the EMBEDDINGS: few of their rows are used at a time.

    `hidden_states` casts those rows. In float32, the chapter's, nothing changes.
    """
    return {name: tensor if name in EMBEDDINGS else tensor.to(dtype) for name, tensor in params.items()}


def cast(params: Params, dtype: torch.dtype, device: torch.device | str | None = None) -> Params:
    """The parameters in another type or place. A tensor that has it already is returned as it is."""
    return map_params(lambda tensor: tensor.to(device=device, dtype=dtype), params)


# The layers

def linear(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (B, T, fan_in) times the transposed weight (fan_out, fan_in), plus the bias if there is one: (B, T, fan_out).

    It is F.linear, or what does the same faster: nearly all of the time goes into this product. `fastest_product`,
    below, knows which.
    """
    weight = params[f"{prefix}.weight"]
    return fastest_product(x, weight)(x, weight, params.get(f"{prefix}.bias"))


def query_key_value(x: Tensor, params: Params, prefix: str) -> tuple[Tensor, ...]:
    """Query, key and value of x (B, T, E): three tensors (B, T, E)."""
    if f"{prefix}.W_query_key_value.weight" in params:  # to generate faster, `pack`, below, has joined the three layers
        return linear(x, params, f"{prefix}.W_query_key_value").chunk(3, dim=-1)
    return tuple(linear(x, params, f"{prefix}.{name}") for name in QUERY_KEY_VALUE)


def layer_norm(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (..., E) with mean 0 and variance 1 along its last axis, then scaled and shifted."""
    scale, shift = params[f"{prefix}.scale"], params[f"{prefix}.shift"]
    return F.layer_norm(x, scale.shape, scale, shift, eps=1e-5)


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """x with each value zeroed with probability `rate` and the others divided by 1 - rate. Without a generator, just x.

    This draws the numbers that F.dropout draws. F.dropout itself can draw from PyTorch's global generator only.
    """
    if generator is None or rate == 0:
        return x
    return torch.empty_like(x).bernoulli_(1 - rate, generator=generator).div_(1 - rate) * x


class Cache(NamedTuple):
    """Keys and values of the tokens that were read so far, so that the next token needs only its own.

    It is for fast generation: `extend`, below, uses one, the chapter does not. buffer is (n_layers, 2, B, H, room, D),
    where 2 is keys and values, or one layer's part of it, (2, B, H, room, D). It has room for `room` tokens, and
    `length` of them are in it.
    """
    buffer: Tensor
    length: int


def attention(x: Tensor, params: Params, prefix: str, config: Config, generator: torch.Generator | None = None,
              cache: Cache | None = None) -> Tensor:
    """Causal multi-head attention over x (B, T, E): (B, T, E).

    With a cache, x is what follows the tokens in it, and sees them too: any number of tokens after an empty cache, one
    after a longer one. Their keys and values are written into its buffer.
    """
    B, T, E = x.shape
    H, D = config.n_heads, E // config.n_heads
    q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in query_key_value(x, params, prefix))  # (B, H, T, D)
    if cache is not None:
        end = cache.length + T
        cache.buffer[0, :, :, cache.length:end] = k
        cache.buffer[1, :, :, cache.length:end] = v
        k, v = cache.buffer[0, :, :, :end], cache.buffer[1, :, :, :end]  # (B, H, end, D)
    if generator is None or config.drop_rate == 0:
        # softmax(q k^T / sqrt(D)) v in one call. A token that follows others in a cache is the last: it may see all.
        context = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None or cache.length == 0)
    else:
        # The same by hand, because that call can't draw its dropout from our generator. The numbers are the chapter's.
        # It divides the scores by sqrt(64) = 8; here q is multiplied by 1/8, which is exact. It replaces the scores of
        # later tokens by -inf; here -inf is added to them.
        later = torch.full((T, T), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        scores = (q * D**-0.5) @ k.transpose(2, 3) + later  # (B, H, T, T)
        context = dropout(scores.softmax(-1), config.drop_rate, generator) @ v
    return linear(context.transpose(1, 2).reshape(B, T, E), params, f"{prefix}.out_proj")


def feed_forward(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (B, T, E) through E -> 4 E -> E, with GELU in its tanh form between: (B, T, E)."""
    return linear(F.gelu(linear(x, params, f"{prefix}.0"), approximate="tanh"), params, f"{prefix}.2")


def transformer_block(x: Tensor, params: Params, prefix: str, config: Config, generator: torch.Generator | None = None,
                      cache: Cache | None = None) -> Tensor:
    """x (B, T, E) plus what attention adds to it, then plus what the feed-forward network adds: (B, T, E)."""
    attended = attention(layer_norm(x, params, f"{prefix}.norm1"), params, f"{prefix}.att", config, generator, cache)
    x = x + dropout(attended, config.drop_rate, generator)
    fed = feed_forward(layer_norm(x, params, f"{prefix}.norm2"), params, f"{prefix}.ff.layers")
    return x + dropout(fed, config.drop_rate, generator)


# The model

def hidden_states(params: Params, token_ids: Tensor, config: Config, generator: torch.Generator | None = None,
                  cache: Cache | None = None) -> Tensor:
    """What the last block makes of the tokens (B, T), which follow those in the cache, if there is one: (B, T, E).

    Errors are those of `forward` and `extend`.
    """
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids must be (batch, tokens), not {tuple(token_ids.shape)}")
    start, T = 0 if cache is None else cache.length, token_ids.shape[1]
    end = start + T
    if start > 0 and T > 1:
        raise ValueError("after the first call a cache takes one token at a time")
    if end > config.context_length or (cache is not None and end > cache.buffer.shape[-2]):
        room = "" if cache is None else f" or the cache's room for {cache.buffer.shape[-2]}"
        raise ValueError(f"{end} tokens are more than context_length {config.context_length}{room}")
    x = F.embedding(token_ids, params["tok_emb.weight"]) + params["pos_emb.weight"][start:end]
    # The embeddings may have another type than the rest, which has that of final_norm.scale: see `compute_in`.
    x = dropout(x, config.drop_rate, generator).to(params["final_norm.scale"].dtype)
    for i in range(config.n_layers):
        layer_cache = None if cache is None else Cache(cache.buffer[i], cache.length)
        x = transformer_block(x, params, f"trf_blocks.{i}", config, generator, layer_cache)
    return x


def output_logits(x: Tensor, params: Params) -> Tensor:
    """The logits (B, T, V), at least in float32, of hidden states x (B, T, E)."""
    logits = linear(layer_norm(x, params, "final_norm"), params, "out_head")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def forward(params: Params, token_ids: Tensor, config: Config, generator: torch.Generator | None = None) -> Tensor:
    """Logits (B, T, V): row t scores every vocabulary entry as the token after token_ids[:, :t + 1] (section 5.1.1).

    token_ids (B, T) are integers below V. There is dropout, at config.drop_rate, exactly when a generator is passed.
    ValueError when token_ids has another number of axes, or more than context_length tokens.
    """
    return output_logits(hidden_states(params, token_ids, config, generator), params)


def calc_loss(params: Params, inputs: Tensor, targets: Tensor, config: Config,
              generator: torch.Generator | None = None) -> Tensor:
    """The mean cross-entropy of the targets (B, T) given the inputs (B, T): a scalar (section 5.1.2).

    It is the mean of -ln(p), where p is the probability of the right token; exp(loss) is the perplexity.
    """
    logits = forward(params, inputs, config, generator)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B * T, V) and (B * T,)


# ---- The chapter ends here. What follows makes it fast: a cache for generation, and a library for the products. ----

def empty_cache(params: Params, batch_size: int, room: int, config: Config) -> Cache:
    """A cache with no tokens in it and room for `room` of them in each of batch_size rows."""
    shape = (config.n_layers, 2, batch_size, config.n_heads, room, config.emb_dim // config.n_heads)
    return Cache(params["final_norm.scale"].new_empty(shape), 0)


def extend(params: Params, token_ids: Tensor, config: Config, cache: Cache) -> tuple[Tensor, Cache]:
    """The last row of logits (B, 1, V) after the cached tokens and then token_ids (B, T), and the longer cache.

    An empty cache takes a whole prompt, a longer one takes one token at a time. The buffer is written into: go on with
    the cache that is returned. ValueError when there would be more tokens than context_length or than the cache's room.
    """
    x = hidden_states(params, token_ids, config, cache=cache)
    return output_logits(x[:, -1:], params), Cache(cache.buffer, cache.length + x.shape[1])


ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build of PyTorch
PROCESSOR = torch.cpu.get_capabilities()
INTEL = str(PROCESSOR.get("cpu_name")).startswith("Intel")
AMX = bool(PROCESSOR.get("amx_bf16"))  # Intel's units for whole matrices
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def fastest_product(x: Tensor, weight: Tensor) -> Product:
    """F.linear, or what does the same to x (B, T, fan_in) and this weight and is faster, as it was measured.

    For float32 PyTorch takes MKL, which is Intel's and the fastest on Intel's processors. On others oneDNN, which is
    within PyTorch too, is faster for one token at a time, and with AVX-512 for many. For 2 to 15 tokens there is little
    between them, and the last digits of section 5.1.2 are MKL's. AMX is for whole matrices: one row has another way.
    """
    T = x.shape[1]
    if weight.is_mkldnn:  # an old name of oneDNN; `pack` makes such weights
        return onednn_linear
    if torch.compiler.is_compiling():  # torch.compile is left its own choice
        return F.linear
    if x.device.type == "cuda" and T >= 16 and len(weight) % 8 > 0:
        return padded
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and AMX and x.numel() == x.shape[-1]:
        return one_row
    if x.device.type == "cpu" and x.dtype == torch.float32 and ONEDNN and not INTEL:
        capability = torch.backends.cpu.get_cpu_capability()
        if (T == 1 and capability in ("AVX2", "AVX512")) or (T >= 16 and capability == "AVX512"):
            return onednn_linear
    return F.linear


def padded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), with outputs up to a multiple of 8 that are computed in vain.

    A GPU's units for matrices want that. Without it the head, with its 50257 outputs, took a third of a training step.
    """
    extra = -len(weight) % 8
    wider = F.linear(x, F.pad(weight, (0, 0, 0, extra)), None if bias is None else F.pad(bias, (0, extra)))
    return wider[..., :len(weight)]


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias) of a single token, x (1, 1, fan_in), as a product of a matrix and a vector."""
    row = weight.mv(x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
    return row.view(1, 1, -1)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), by oneDNN."""
    needs_gradient = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
    if x.is_inference() and not needs_gradient:  # in generation, where the detour over autograd would cost time
        return onednn_product(x, weight, bias)
    return onednn_with_gradient(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., fan_in) times the transposed weight (fan_out, fan_in) plus the bias. PyTorch has no gradient for it."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # "none": no activation
    return product


class OneDNNLinear(torch.autograd.Function):
    """`onednn_product` with its gradient, which is made of the same products, and so has a gradient in turn."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient_rows, x_rows = gradient.flatten(0, -2), x.flatten(0, -2)  # (B * T, fan_out) and (B * T, fan_in)
        return (onednn_with_gradient(gradient, weight.t(), None),
                onednn_with_gradient(gradient_rows.t(), x_rows.t(), None),
                gradient_rows.sum(0) if ctx.has_bias else None)


onednn_with_gradient: Product = OneDNNLinear.apply


def pack(params: Params) -> Params:
    """The parameters as a CPU reads them faster: a token takes 7 to 50 % less time. To pack takes that of two tokens.

    Query, key and value of each block are joined to one layer. Where the processor has instructions for bfloat16, but
    no AMX, its matrices get the layout in which oneDNN reads them twice as fast; for float32 that would not pay.
    """
    if params["final_norm.scale"].device.type != "cpu":
        return params
    packed = dict(params)
    for query in [name for name in params if ".W_query." in name]:
        parts = [packed.pop(query.replace("W_query", name)) for name in QUERY_KEY_VALUE]
        packed[query.replace("W_query", "W_query_key_value")] = torch.cat(parts)
    if ONEDNN and not AMX and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for name, tensor in packed.items():
            if tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and name not in EMBEDDINGS and not tensor.is_mkldnn:
                packed[name] = torch.ops.mkldnn._reorder_linear_weight(tensor, 1)  # for 1 token at a time
    return packed
