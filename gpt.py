"""GPT-2 as pure functions over a flat dict of parameters.

`forward` embeds the tokens, applies `transformer_block` n_layers times and scores every vocabulary entry as the next
token. Each function gets all the parameters and the `prefix` of those it uses: "trf_blocks.3.att", as in a state_dict.

Nothing is remembered between calls: the same arguments, a generator's state among them, give the same result. What is
drawn from a generator moves it on; beyond that, a function writes into its arguments only where its docstring says so.
A docstring begins with what is returned, or else done.

Axes, one letter each: B batch, T tokens, V vocabulary, E embedding, H heads, D head size (E = H * D).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]  # the names are those of the chapter's state_dict
EMBEDDINGS = ("tok_emb.weight", "pos_emb.weight")  # only looked up, never multiplied


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
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} must be a multiple of n_heads {self.n_heads}")
        if type(self.drop_rate) not in (int, float) or not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and less than 1, not {self.drop_rate!r}")
        if type(self.qkv_bias) is not bool:
            raise ValueError(f"qkv_bias must be True or False, not {self.qkv_bias!r}")


GPT_CONFIG_124M = Config(vocab_size=50257, context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1,
                         qkv_bias=False)


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter, in the order in which the chapter's model registers them."""
    E = config.emb_dim
    linear_layers = {"att.W_query": (E, E), "att.W_key": (E, E), "att.W_value": (E, E), "att.out_proj": (E, E),
                     "ff.layers.0": (4 * E, E), "ff.layers.2": (E, 4 * E)}  # (fan_out, fan_in)
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (config.vocab_size, E),
                                          "pos_emb.weight": (config.context_length, E)}
    for block in (f"trf_blocks.{i}" for i in range(config.n_layers)):
        for name, shape in linear_layers.items():
            shapes[f"{block}.{name}.weight"] = shape
            if config.qkv_bias or "W_" not in name:
                shapes[f"{block}.{name}.bias"] = shape[:1]
        shapes |= {f"{block}.{name}": (E,) for name in ("norm1.scale", "norm1.shift", "norm2.scale", "norm2.shift")}
    return shapes | {"final_norm.scale": (E,), "final_norm.shift": (E,), "out_head.weight": (config.vocab_size, E)}


def init_params(config: Config, generator: torch.Generator) -> Params:
    """Fresh float32 parameters: standard normal embeddings, linear layers uniform on +-1/sqrt(fan_in), identity norms.

    Drawn in the order of `param_shapes`, which gives the numbers of the chapter's model after `torch.manual_seed`
    when `generator` has that seed (section 5.1.1).
    """
    params, fan_in = {}, 0
    for name, shape in param_shapes(config).items():
        if name.endswith(("scale", "shift")):
            params[name] = torch.full(shape, 1.0 if name.endswith("scale") else 0.0)
        elif name in EMBEDDINGS:
            params[name] = torch.empty(shape).normal_(generator=generator)
        else:
            fan_in = shape[-1] if name.endswith("weight") else fan_in  # a bias comes after its weight, with its range
            params[name] = torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return params


def cast(params: Params, dtype: torch.dtype, device: torch.device | None = None) -> Params:
    """The parameters in another type or place; tied ones stay tied. Those already there are returned as they are."""
    moved = {id(tensor): tensor.to(device=device, dtype=dtype) for tensor in params.values()}
    return {name: moved[id(tensor)] for name, tensor in params.items()}


def linear(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (B, T, fan_in) times the transposed weight (fan_out, fan_in), plus the bias if it has one: (B, T, fan_out)."""
    return matmul(x, params[f"{prefix}.weight"], params.get(f"{prefix}.bias"))


def layer_norm(x: Tensor, params: Params, prefix: str) -> Tensor:
    """x (..., E) with mean 0 and variance 1 along its last axis, then scaled and shifted."""
    scale, shift = params[f"{prefix}.scale"], params[f"{prefix}.shift"]
    return F.layer_norm(x, scale.shape, scale, shift, eps=1e-5)


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """x with each value zeroed with probability `rate` and the others divided by 1 - rate; x without a generator."""
    if generator is None or rate == 0:
        return x
    return torch.empty_like(x).bernoulli_(1 - rate, generator=generator).div_(1 - rate) * x


def attention(x: Tensor, params: Params, prefix: str, config: Config, generator: torch.Generator | None = None,
              cache: Tensor | None = None, start: int = 0) -> Tensor:
    """Causal multi-head attention (B, T, E) over x (B, T, E); with a cache, over the `start` tokens before x as well.

    cache (2, B, H, room, D) holds the keys and values of those tokens; those of x are written behind them.
    """
    B, T, E = x.shape
    q, k, v = (linear(x, params, f"{prefix}.{part}").view(B, T, config.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
               for part in ("W_query", "W_key", "W_value"))
    if cache is not None:
        cache[:, :, :, start:start + T] = torch.stack((k, v))
        k, v = cache[:, :, :, :start + T]  # each (B, H, start + T, D)
    if generator is None or config.drop_rate == 0:
        context = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # a single token sees all before it
    else:  # the same by hand, because only here can the dropout draw from our generator
        future = torch.full((T, T), -torch.inf, dtype=x.dtype, device=x.device).triu_(1)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).add_(future).softmax(-1)  # (B, H, T, T)
        context = dropout(weights, config.drop_rate, generator) @ v
    return linear(context.transpose(1, 2).reshape(B, T, E), params, f"{prefix}.out_proj")


def feed_forward(x: Tensor, params: Params, prefix: str) -> Tensor:
    """E -> 4 E -> E, with GELU in its tanh form between."""
    return linear(F.gelu(linear(x, params, f"{prefix}.0"), approximate="tanh"), params, f"{prefix}.2")


def transformer_block(x: Tensor, params: Params, prefix: str, config: Config, generator: torch.Generator | None = None,
                      cache: Tensor | None = None, start: int = 0) -> Tensor:
    """x (B, T, E) plus what attention, which writes into the cache, then what the feed-forward network adds to it."""
    attended = attention(layer_norm(x, params, f"{prefix}.norm1"), params, f"{prefix}.att", config, generator, cache,
                         start)
    x = x + dropout(attended, config.drop_rate, generator)
    fed = feed_forward(layer_norm(x, params, f"{prefix}.norm2"), params, f"{prefix}.ff.layers")
    return x + dropout(fed, config.drop_rate, generator)


def forward(params: Params, token_ids: Tensor, config: Config, generator: torch.Generator | None = None,
            cache: Tensor | None = None, start: int = 0) -> Tensor:
    """Logits (B, T, V): row t scores every vocabulary entry as the token after token_ids[:, :t + 1] (section 5.1.1).

    token_ids (B, T) are integers below V. There is dropout, at config.drop_rate, if and only if a generator is passed.
    With a cache, made by `empty_cache`, token_ids follow the `start` tokens whose keys and values it holds: a whole
    prompt at 0, a single token after that. Theirs are written into it, and only the last row of logits (B, 1, V) comes.
    Logits are float32 at least. ValueError when there would be more than context_length tokens.
    """
    T = token_ids.shape[1]
    if start + T > config.context_length:
        raise ValueError(f"{start + T} tokens are more than context_length {config.context_length}")
    if start and T > 1:
        raise ValueError("after the first call a cache takes one token at a time")
    x = F.embedding(token_ids, params["tok_emb.weight"]) + params["pos_emb.weight"][start:start + T]
    x = dropout(x, config.drop_rate, generator).to(params["final_norm.scale"].dtype)  # train_step casts no EMBEDDINGS
    for i in range(config.n_layers):
        kept = None if cache is None else cache[i]
        x = transformer_block(x, params, f"trf_blocks.{i}", config, generator, kept, start)
    logits = linear(layer_norm(x if cache is None else x[:, -1:], params, "final_norm"), params, "out_head")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def calc_loss(params: Params, inputs: Tensor, targets: Tensor, config: Config,
              generator: torch.Generator | None = None) -> Tensor:
    """Mean cross-entropy, in nats a token, of the targets (B, T) given the inputs (B, T): a scalar (section 5.1.2)."""
    logits = forward(params, inputs, config, generator)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B * T, V) and (B * T,)


def empty_cache(params: Params, batch_size: int, room: int, config: Config) -> Tensor:
    """Room for the keys and values of so many tokens in each of batch_size rows: (n_layers, 2, B, H, room, D)."""
    return params["final_norm.scale"].new_empty(
        config.n_layers, 2, batch_size, config.n_heads, room, config.emb_dim // config.n_heads)


# Nearly all of the time goes into one operation, the product with a weight. What follows is F.linear, computed by a
# library within PyTorch, oneDNN: on AMD's processors in half the time of what PyTorch itself would choose for float32.
ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build of PyTorch


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias): x (B, T, fan_in), weight (fan_out, fan_in), result (B, T, fan_out)."""
    packed = weight.is_mkldnn  # by `pack`
    # For 2 to 15 tokens both are as fast, and the last digits of section 5.1.2 are those of PyTorch's own rounding.
    better = ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not 1 < x.shape[1] < 16
    if packed or (better and not torch.is_grad_enabled()):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # no activation after it
        return product
    if better:  # the form that autograd sees through; it copies x and the product
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    return F.linear(x, weight, bias)


def pack(params: Params) -> Params:
    """The parameters with their bfloat16 matrices laid out as oneDNN reads them twice as fast, to generate with.

    Others are as they were: the layout of a float32 matrix costs more time than generation would win by it.
    """
    if not ONEDNN or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return params
    packed = dict(params)
    for name, tensor in params.items():
        plain = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not tensor.is_mkldnn
        if plain and tensor.ndim == 2 and name not in EMBEDDINGS:
            packed[name] = torch.ops.mkldnn._reorder_linear_weight(tensor, 1)  # for 1 token at a time
    return packed
