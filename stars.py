#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""STARS: data-free distillation of an ANN teacher into a spiking (SNN) student, one file of NumPy.

0  READING GUIDE.  A trained teacher knows its classes and, in its batch norms, the statistics of
data that is gone. A generator makes images from that knowledge, Eq. (9); a spiking student learns
the teacher's answers on them, Eq. (10). Sections 0 to 6 are the method, the rest makes it a tool:

    1 arrays and devices          4 networks, Eq. (11)      7 data                 10 reports
    2 operators                   5 losses, (3)-(9), (12)   8 weights and files    11 command line
    3 spiking neuron, Eq. (1-2)   6 optimisers              9 procedures, (10)     12 fast paths

The equations are numbered as in README.md; `# Eq. (n)` stands on the line that computes one.
Eq. (7) and (8) are this project's formalisation of the abstract of STARS (arXiv 2605.27409):
the ideas are the paper's, the formulas are ours. Eq. (12) is not in the abstract.

Images and feature maps are NHWC, convolution weights (K, C, R, S), names of parameters those of a
PyTorch state_dict. T time steps are folded into the batch: (T, N, ...) -> (T*N, ...).
`value, back = operator(...)`: back takes the gradient of the value and returns the gradients of the
arguments, in their order (of a network: x, then {name: gradient}); it changes nothing and is called
once. `need` says which are wanted, "x" for the input and "p" for the parameters; the others are
None and cost nothing. A tap sees the input a of a batch norm and may return da -> da with its own
gradient added, in place if it likes.
Parameters and images have one dtype. NumPy checks most shapes; ValueError names an argument.
"""
import collections, dataclasses, functools, os, re, sys
from types import SimpleNamespace
from typing import Any, NamedTuple

_ours = not {"numpy", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & {*sys.modules, *os.environ}
if _ours:  # section 12 works on chunks of images in parallel, so one BLAS thread for each chunk
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
try:
    import numpy as np
except ImportError:
    raise SystemExit("stars.py needs numpy: pip install numpy") from None
if _ours:
    del os.environ["OPENBLAS_NUM_THREADS"]

# ---- 1  Arrays and devices -----------------------------------------------------------------------

xp = np  # the array module of every function below: numpy, or cupy after use_device("gpu")
TF32 = 0  # 1 if a GPU multiplies in TF32

def use_device(name="auto", tf32=False):
    """Put arrays on the "cpu" (NumPy), the "gpu" (CuPy), or "auto": the GPU if a kernel runs there.
    tf32: multiply in TF32 (cuBLAS heeds the first call).   -> "cpu" or "gpu".   RuntimeError: "gpu"
    was asked for, and none is there."""
    global xp, TF32
    require(name in ("cpu", "gpu", "auto"), f"device must be cpu, gpu or auto, not {name!r}")
    xp, TF32 = np, int(tf32)
    if name != "cpu":
        try:
            os.environ["CUPY_TF32"] = str(TF32)
            import cupy
            x = cupy.arange(4, dtype=cupy.float32).reshape(2, 2)
            int((x @ x).sum())  # compiles and runs
            xp = cupy
        except Exception as error:  # not installed, no driver, no device, no compiler
            if name == "gpu":
                raise RuntimeError(f"no usable GPU ({type(error).__name__}: {error}): install the "
                                   "CuPy wheel of your CUDA version, or use the cpu") from None
    return "cpu" if xp is np else "gpu"

def to_host(x):
    """A NumPy array of x, which may live on the GPU."""
    return x.get() if hasattr(x, "get") else np.asarray(x)

def fast(x):
    """Whether section 12 computes in place of the formulas: float32."""
    return x.dtype == np.float32

def require(condition, sentence, error=ValueError):
    """Raise error(sentence) unless condition holds."""
    if not condition:
        raise error(sentence)

def expect(name, x, *shape):
    """Raise ValueError unless the array called name has this shape; None stands for any size."""
    require(x.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, x.shape)),
            f"{name} must have shape {shape}".replace("None", "any") + f", has {x.shape}")

# ---- 2  Operators: value and adjoint -------------------------------------------------------------

def conv2d(x, w, stride=1, need="xp"):
    """Same convolution, stride d.   y_n,i,j,k = sum_c,r,s x_n,i*d+r-R//2,j*d+s-S//2,c w_k,c,r,s
    x (N, H, W, C), w (K, C, R, S), R and S odd, stride 1 or 2 -> y (N, ceil(H/stride), .., K).
    back: dy -> dx, dw. Keeps w, on a GPU copies; x, padded, where dw is wanted."""
    expect("x", x, None, None, None, None)
    expect("w", w, None, x.shape[3], None, None)
    require(w.shape[2] % 2 and w.shape[3] % 2, f"w must have odd height and width, has {w.shape}")
    require(stride in (1, 2), f"stride must be 1 or 2, not {stride!r}")
    if fast(x) and (xp is np or tensor_cores()):
        return (fast_conv2d if xp is np else gpu_conv2d)(x, w, stride, need)
    (N, H, W, C), (K, _, R, S) = x.shape, w.shape
    P, Q = R // 2, S // 2
    padded = xp.pad(x, ((0, 0), (P, P), (Q, Q), (0, 0)))
    def window(a, r, s):  # the part of a padded array that w[:, :, r, s] multiplies
        return a[:, r:r + H:stride, s:s + W:stride]
    y = sum(window(padded, r, s) @ w[:, :, r, s].T for r, s in np.ndindex(R, S))
    kept = padded if "p" in need else None
    def back(dy):
        dx = dw = None
        if "x" in need:
            dpadded = xp.zeros((N, H + 2 * P, W + 2 * Q, C), dy.dtype)
            for r, s in np.ndindex(R, S):
                part = window(dpadded, r, s)
                part += dy @ w[:, :, r, s]
            dx = dpadded[:, P:P + H, Q:Q + W]
        if "p" in need:
            dw = xp.stack([dy.reshape(-1, K).T @ window(kept, r, s).reshape(-1, C)
                           for r, s in np.ndindex(R, S)], -1).reshape(w.shape)
        return dx, dw
    return y, back

def channel_mean(x):
    """Mean over all axes but the last, in two stages for the sake of float32.   x (N, .., C)."""
    return x.reshape(len(x), -1, x.shape[-1]).mean(1).mean(0)

def batch_norm(x, gamma, beta, mean, var, train=False, need="xp", momentum=.1, eps=1e-5):
    """y = gamma (x - m) / sqrt(v + eps) + beta, over all axes but the last.   Ioffe & Szegedy 2015
    x (..., C); gamma, beta, mean, var (C,). m, v: mean, var (eval) or those of x (train, v biased).
    Value: (y, running). running: (mean, var), in train mode updated as PyTorch does, with unbiased
    variance (returned, not written).   back: dy -> dx, dgamma, dbeta. Keeps the normalised x."""
    for name, vector in (("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var)):
        expect(name, vector, x.shape[-1])
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    require(count > 1 or not train, "x must have more than one value a channel in train mode")
    m, v, running = mean, var, (mean, var)
    if train:
        m = channel_mean(x)
        v = channel_mean((x - m) ** 2)
        running = (mean + momentum * (m - mean), var + momentum * (v * (count / (count - 1)) - var))
    scale = 1 / xp.sqrt(v + eps)
    normal = (x - m) * scale
    def back(dy):
        dx = dgamma = dbeta = None
        if train or "p" in need:
            dgamma, dbeta = (dy * normal).sum(axes), dy.sum(axes)
        if "x" in need:
            dx = dy - (dbeta + normal * dgamma) / count if train else dy
            dx = dx * (gamma * scale)
        return (dx, dgamma, dbeta) if "p" in need else (dx, None, None)
    return (normal * gamma + beta, running), back

def identity(x):
    """y = x.   back: dy -> dx."""
    return x, lambda dy: dy

def relu(x):
    """y = max(0, x), with gradient 0 at 0.   back: dy -> dx. Keeps the mask."""
    mask = x > 0
    return xp.maximum(x, 0), lambda dy: dy * mask

def leaky_relu(x, slope=0.2):
    """y = x where x > 0, else slope x.   back: dy -> dx. Keeps the mask."""
    mask = x > 0
    return xp.where(mask, x, slope * x), lambda dy: xp.where(mask, dy, slope * dy)

def sigmoid(x):
    """y = 1 / (1 + exp(-x)).   back: dy -> dx. Keeps y."""
    y = 0.5 * xp.tanh(0.5 * x) + 0.5  # which cannot overflow
    return y, lambda dy: dy * y * (1 - y)

def linear(x, w, b, need="xp"):
    """y = x w' + b.   x (N, D), w (K, D), b (K,) -> y (N, K).   back: dy -> dx, dw, db."""
    def back(dy):
        dx = dy @ w if "x" in need else None
        return (dx, dy.T @ x, dy.sum(0)) if "p" in need else (dx, None, None)
    return x @ w.T + b, back

def global_average_pool(x):
    """y_nc = mean_hw x_nhwc.   x (N, H, W, C) -> y (N, C).   back: dy -> dx."""
    N, H, W, C = x.shape
    return x.mean((1, 2)), lambda dy: xp.broadcast_to((dy / (H * W))[:, None, None], x.shape)

def _quarters(x):
    """The four views (N, H/2, W/2, C) of x that hold the pixels of each 2x2 window, row by row."""
    require(x.shape[1] % 2 == x.shape[2] % 2 == 0, f"x must have even sides, has {x.shape}")
    return [x[:, i::2, j::2] for i, j in np.ndindex(2, 2)]

def max_pool(x):
    """2x2 maximum, of equals the first takes dy.   x (N, H, W, C) -> y (N, H/2, W/2, C)."""
    a, b, c, d = _quarters(x)
    y = xp.maximum(xp.maximum(a, b), xp.maximum(c, d))
    def back(dy):
        dx, open_ = xp.empty(x.shape, dy.dtype), xp.ones(y.shape, bool)
        for quarter, dquarter in zip(_quarters(x), _quarters(dx)):
            wins = open_ & (quarter == y)
            dquarter[...] = dy * wins
            open_ &= ~wins
        return dx
    return y, back

def upsample(x):
    """Nearest-neighbour upsampling by 2.   x (N, H, W, C) -> y (N, 2H, 2W, C)."""
    N, H, W, C = x.shape
    y = xp.broadcast_to(x[:, :, None, :, None], (N, H, 2, W, 2, C)).reshape(N, 2 * H, 2 * W, C)
    return y, lambda dy: sum(_quarters(dy))

def shortcut_a(x, channels):
    """Parameter-free shortcut: every second pixel, zero channels on both sides (He et al. 2016, A).
    x (N, H, W, C) -> y (N, ceil(H/2), ceil(W/2), channels)."""
    C = x.shape[3]
    require(channels >= C, f"channels must be at least {C} as in x, not {channels}")
    low = (channels - C) // 2
    def back(dy):
        dx = xp.zeros(x.shape, dy.dtype)
        dx[:, ::2, ::2] = dy[..., low:low + C]
        return dx
    return xp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (low, channels - C - low))), back

def log_softmax(x):
    """y = x - log sum_k exp x_k.   x (N, K).   back: dy -> dx. Keeps y."""
    y = x - x.max(1, keepdims=True)
    y = y - xp.log(xp.exp(y).sum(1, keepdims=True))
    return y, lambda dy: dy - xp.exp(y) * dy.sum(1, keepdims=True)

def cosine_matrix(f):
    """y_ij = f_i . f_j / (|f_i| |f_j|), 0 with zero gradient where a norm is 0.   f (B, D)."""
    norm = xp.sqrt((f * f).sum(1, keepdims=True))
    inverse = (norm > 0) / xp.where(norm > 0, norm, 1)
    unit = f * inverse
    def back(dy):
        dunit = (dy + dy.T) @ unit
        return (dunit - unit * (unit * dunit).sum(1, keepdims=True)) * inverse
    return unit @ unit.T, back

def repeat_over_time(x, T):
    """The same input at every step.   x (N, ...) -> y (T*N, ...)."""
    return xp.concatenate([x] * T), lambda dy: dy.reshape((T,) + x.shape).sum(0)

def mean_over_time(x, T):
    """y_n = 1/T sum_t x_tn.   x (T*N, ...) -> y (N, ...)."""
    require(T >= 1 and len(x) % T == 0, f"T must divide the {len(x)} rows of x, is {T}")
    return x.reshape((T, -1) + x.shape[1:]).mean(0), lambda dy: repeat_over_time(dy / T, T)[0]

def normalise(x, mean, std):
    """y = (x - mean) / std.   x (N, H, W, 3) in [0, 1]; mean, std: a number for each channel."""
    mean, std = xp.asarray(mean, x.dtype), xp.asarray(std, x.dtype)
    return (x - mean) / std, lambda dy: dy / std

def augment(x, offsets, flips, pad=4):
    """Crop out of a zero-padded image, then mirror left-right.   x (N, H, W, C) -> y as x.
    offsets (N, 2): row and column of the crop, integers in 0 .. 2 pad; flips (N,): booleans."""
    N, H, W, C = x.shape
    require(np.isin(to_host(offsets), range(2 * pad + 1)).all(), f"offsets must be 0 .. {2 * pad}")
    offsets, flips = xp.asarray(offsets), xp.asarray(flips)
    rows = offsets[:, :1] + xp.arange(H)
    columns = offsets[:, 1:] + xp.where(flips[:, None], xp.arange(W)[::-1], xp.arange(W))
    index = xp.arange(N)[:, None, None], rows[:, :, None], columns[:, None]
    padded = xp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    def back(dy):
        dpadded = xp.zeros(padded.shape, dy.dtype)
        dpadded[index] = dy
        return dpadded[:, pad:pad + H, pad:pad + W]
    return padded[index], back

# ---- 3  Spiking neuron ---------------------------------------------------------------------------

SURROGATES = {  # name: (primitive G, derivative g' = dG/dx) of x = (u - V)/V, Eq. (2)
    "sigmoid": (lambda x: sigmoid(4 * x)[0], lambda x: 1 - xp.tanh(2 * x) ** 2),
    "atan": (lambda x: xp.arctan(np.pi * x) / np.pi + .5, lambda x: 1 / (1 + (np.pi * x) ** 2)),
    "triangle": (lambda x: .5 + xp.clip(x, -1, 1) * (1 - abs(xp.clip(x, -1, 1)) / 2),
                 lambda x: xp.maximum(0, 1 - abs(x)))}

@dataclasses.dataclass(frozen=True)
class Neuron:
    """How a layer of LIF neurons behaves; threshold V and amplitude A belong to each layer."""
    lam: float = 0.5             # leak: the share of the membrane potential kept from step to step
    reset: str = "hard"          # after a spike: "hard" sets u to 0, "soft" subtracts V
    v_init: float = 0.0          # u_0 in units of V
    surrogate: str = "sigmoid"   # a key of SURROGATES
    detach_reset: bool = True    # no gradient through the spike in the reset

    def __post_init__(self):
        require(self.reset in ("hard", "soft"), f"reset must be hard or soft, not {self.reset!r}")
        require(0 <= self.lam <= 1, f"lam must be 0 to 1, not {self.lam}")
        require(self.surrogate in SURROGATES,
                f"surrogate must be one of {', '.join(SURROGATES)}, not {self.surrogate!r}")

def lif(current, T, v_th=1.0, amplitude=1.0, neuron=Neuron(), spike=None):
    """Leaky integrate-and-fire over T steps: Eq. (1) forward, Eq. (2) backward through time.
    current (T*N, ...) -> z (T*N, ...) of values 0 and amplitude. v_th > 0, amplitude: numbers.
    spike: x = (u - V)/V -> s, called once a step: the Heaviside step unless a check replaces it.
    back: dz -> dcurrent. Keeps the membrane before reset and the spikes."""
    lam, V, A, hard = float(neuron.lam), float(v_th), float(amplitude), neuron.reset == "hard"
    require(T >= 1 and len(current) % T == 0, f"T must divide the {len(current)} rows, is {T}")
    require(V > 0, f"v_th must be positive, not {V}")
    spike = spike or (lambda x: (x >= 0).astype(x.dtype))
    slope = SURROGATES[neuron.surrogate][1]
    shape, drive = current.shape, current.reshape((T, -1) + current.shape[1:])
    membrane, spikes = xp.empty_like(drive), xp.empty_like(drive)
    u, s = xp.full(drive.shape[1:], float(neuron.v_init) * V, drive.dtype), 0.0
    for t in range(T):
        u = lam * (u * (1 - s) if hard else u - V * s) + drive[t]  # Eq. (1)
        s = spike((u - V) / V)
        membrane[t], spikes[t] = u, s
    def back(dz):
        dz, dcurrent = dz.reshape(membrane.shape), xp.empty_like(membrane)
        dkept = 0.0  # the gradient on reset(u_t): lam times that on u_{t+1}
        for t in reversed(range(T)):
            u, s = membrane[t], spikes[t]
            ds = A * dz[t]
            if not neuron.detach_reset:
                ds = ds - dkept * (u if hard else V)
            du = ds * slope((u - V) / V) / V  # Eq. (2)
            du = du + (dkept * (1 - s) if hard else dkept)
            dcurrent[t] = du
            dkept = lam * du
        return dcurrent.reshape(shape)
    return A * spikes.reshape(shape), back

# ---- 4  Networks ---------------------------------------------------------------------------------

class Net(NamedTuple):
    """A teacher (activation relu, T = 1) or a student (activation a Neuron) and how to run it."""
    params: dict                             # name -> array; <layer>.v_th, .amplitude: numbers
    activation: Any = relu                   # a Neuron, or a function x -> (y, back)
    T: int = 1                               # time steps
    mean: tuple = (0.4914, 0.4822, 0.4465)   # normalisation of images in [0, 1], per channel
    std: tuple = (0.2470, 0.2435, 0.2616)

class Output(NamedTuple):
    """What a network gives, and what it met on the way."""
    logits: Any      # (N, K), averaged over time
    features: Any    # (N, D), the pooled input of the last linear layer, averaged over time
    running: dict    # train: the next running statistics, by parameter name
    rates: dict      # measure: layer -> share of neurons and steps that spike
    costs: list      # measure: (layer, MACs an image, accumulates an image and step or None)

def norm_activation(a, gamma, beta, mean, var, activation=relu, T=1, v_th=1.0, amplitude=1.0,
                    first=False, shortcut=None, train=False, need="p"):
    """z = activation(batch_norm(a) + shortcut).   first: a is (N, ...) and drives all T steps.
    Value: (z, running) as in batch_norm.   back: dz and, if not None, each (N, ...), to add to dz
    at every step -> da, dgamma, dbeta, dshortcut; da always."""
    if fast(a) and fast_can(a, gamma, beta, mean, var, activation, T, v_th, first, shortcut):
        path = fast_norm_activation if xp is np else gpu_norm_activation
        return path(a, gamma, beta, mean, var, activation, T, v_th, amplitude, first, shortcut,
                    train, need)
    (y, running), norm_back = batch_norm(a, gamma, beta, mean, var, train, "x" + need)
    y, time_back = repeat_over_time(y, T) if first and T > 1 else identity(y)
    y = y if shortcut is None else y + shortcut
    z, activation_back = (lif(y, T, v_th, amplitude, activation) if isinstance(activation, Neuron)
                          else activation(y))
    def back(dz, each=None):
        dy = activation_back(dz if each is None else dz + repeat_over_time(each, T)[0])
        return (*norm_back(time_back(dy)), dy if shortcut is not None else None)
    return (z, running), back

def batch_norms(params):
    """The names of the batch norms with running statistics, from the input to the output; that of
    a shortcut after the others of its block."""
    def depth(name):
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return sorted((k[:-13] for k in params if k.endswith(".running_mean")), key=depth)

def _layer(run, conv, norm, x, stride=1, first=False, shortcut=None, fires=True):
    """activation(batch_norm(conv2d(x)) + shortcut), by names; if it does not fire, without
    activation.   back: dz -> dx (, dshortcut)."""
    activation, T = (run.activation, run.T) if fires else (identity, 1)
    p, need = run.params, run.need and run.need + "x" * (not first)
    w = p[conv + ".weight"]
    a, conv_back = conv2d(x, w, stride, need)  # the gradient passes through all but the first
    tap_back = run.tap and run.tap(norm, a)
    (z, running), norm_back = norm_activation(
        a, *(p[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")),
        activation, T, p.get(norm + ".v_th", 1.0), p.get(norm + ".amplitude", 1.0), first, shortcut,
        run.train, run.need)
    if run.train:
        run.running[norm + ".running_mean"], run.running[norm + ".running_var"] = running
    watched = run.watch and fires and run.watch(norm, z)
    if run.measure:
        macs, spikes = a[0, ..., 0].size * w.size, isinstance(run.activation, Neuron) and not first
        run.costs.append((conv, macs, macs * float((x != 0).mean()) if spikes else None))
        if isinstance(activation, Neuron):
            run.rates[norm] = float((z != 0).mean())
    def back(dz):
        da, dgamma, dbeta, dshortcut = norm_back(dz, watched() if watched else None)
        if tap_back:
            da = tap_back(da)
        dx, dw = conv_back(da)
        if "p" in run.need:
            run.grads |= {conv + ".weight": dw, norm + ".weight": dgamma, norm + ".bias": dbeta}
        return dx if dshortcut is None else (dx, dshortcut)
    return z, back

def _residual_block(run, name, x, stride):
    """activation(bn2(conv2(z)) + shortcut(x)), z = activation(bn1(conv1(x))).   back: dy -> dx."""
    channels = run.params[name + ".conv2.weight"].shape[0]
    z, back1 = _layer(run, name + ".conv1", name + ".bn1", x, stride)
    if name + ".shortcut.0.weight" in run.params:
        kept, shortcut_back = _layer(run, name + ".shortcut.0", name + ".shortcut.1", x, stride,
                                     fires=False)
    else:
        same = stride == 1 and x.shape[3] == channels
        kept, shortcut_back = identity(x) if same else shortcut_a(x, channels)
        if run.measure and isinstance(run.activation, Neuron):  # an accumulate for each spike
            run.costs.append((name + ".shortcut", 0, float((kept != 0).sum()) / len(kept)))
    y, back2 = _layer(run, name + ".conv2", name + ".bn2", z, 1, shortcut=kept)
    def back(dy):
        dz, dkept = back2(dy)
        dx = back1(dz)
        dx += shortcut_back(dkept)
        return dx
    return y, back

def _network(body, last, params, x, activation, T, train=False, tap=None, watch=None, need="xp",
             measure=False):
    """What resnet and vgg share: body(run, add) makes the last maps; here they are classified."""
    run = SimpleNamespace(params=params, activation=activation, T=T, train=train, measure=measure,
                          tap=tap, watch=watch, need=need, grads={}, running={}, rates={}, costs=[])
    expect("x", x, None, None, None, 3)
    backs = [] if need else collections.deque(maxlen=0)  # which keeps none
    def add(z, back):
        backs.append(back)
        return z
    pooled = add(*global_average_pool(body(run, add)))
    features = add(*mean_over_time(pooled, T))
    w, b = params[last + ".weight"], params[last + ".bias"]
    logits, linear_back = linear(features, w, b, need and "x" + need)
    if measure:
        run.costs.append((last, w.size, None))  # its input is an average
    def back(dlogits, dfeatures=None):
        dx, dw, db = linear_back(dlogits)
        if "p" in need:
            run.grads |= {last + ".weight": dw, last + ".bias": db}
        dx = dx if dfeatures is None else dx + dfeatures
        while backs:  # what a layer kept is freed as soon as its gradient is known
            dx = backs.pop()(dx)
        return dx, run.grads
    return Output(logits, features, run.running, run.rates, run.costs), back

def resnet(params, x, activation=relu, T=1, **mode):
    """A ResNet of basic blocks (He et al. 2016), its shape read off the names in params.
    x (N, H, W, 3), normalised. activation: relu, a Neuron (T steps, each driven by the image
    through the first convolution) or a function x -> (y, back). mode: train; need; tap(layer, a),
    called with the name and the input a of each batch norm: None, or da -> da with its gradient
    added; watch(layer, z), with the output z of the activation after it: None, or () -> None or its
    gradient on z, the same (N, ...) at every step; measure, to fill rates and costs.
    Value: Output.   back: dlogits (N, K), dfeatures (N, D) or None -> dx, {name: gradient}."""
    def body(run, add):
        z = add(*_layer(run, "conv1", "bn1", x, first=True))
        for block in dict.fromkeys(".".join(k.split(".")[:2]) for k in batch_norms(params)[1:]):
            stride = 2 if block.endswith(".0") and block != "layer1.0" else 1
            z = add(*_residual_block(run, block, z, stride))
        return z
    return _network(body, "linear", params, x, activation, T, **mode)

def vgg(params, x, activation=relu, T=1, **mode):
    """A VGG as torchvision numbers it: conv features.N, norm N+1, activation N+2, perhaps pool N+3;
    H and W multiples of 32, the rest as resnet."""
    def body(run, add):
        convs = sorted(int(k[9:-7]) for k, w in params.items() if np.ndim(w) == 4)
        z = x
        for n, following in zip(convs, convs[1:] + [0]):
            z = add(*_layer(run, f"features.{n}", f"features.{n + 1}", z, first=n == 0))
            if following != n + 3:
                z = add(*max_pool(z))
        return z
    return _network(body, "classifier", params, x, activation, T, **mode)

def forward(net, x, **mode):
    """Run a Net on normalised images x (N, H, W, 3); mode, value and back as resnet."""
    family = vgg if "classifier.weight" in net.params else resnet
    return family(net.params, x, net.activation, net.T, **mode)

def same_normalisation(teacher, student):
    """ValueError unless both Nets normalise images alike, as Eq. (9) and (10) have it."""
    require(np.allclose((teacher.mean, teacher.std), (student.mean, student.std)),
            "student must have the mean and std of the teacher")

def generator(params, z, need="p", activation=leaky_relu):
    """Images from latents: linear, BN, twice (upsample, convolve, BN, leaky ReLU), convolve,
    sigmoid.
    z (N, Z): noise; with one-hot labels beside it, class-conditional. Batch norms in train mode.
    Value: images (N, S, S, 3) in [0, 1].   back: dimages -> dz, {name: gradient}."""
    p, grads, backs = params, {}, []
    def add(value, back, *names):  # an operator, and the names of its parameters
        def through(dy):
            dx, *dparams = back(dy) if names else (back(dy),)
            grads.update((name, g) for name, g in zip(names, dparams) if g is not None)
            return dx
        backs.append(through)
        return value
    def add_bias(x, b):  # the last convolution has no batch norm after it
        return x + b, lambda dy: (dy, dy.sum((1, 2)).sum(0) if "p" in need else None)
    y = add(*linear(z, p["fc.weight"], p["fc.bias"], need), "fc.weight", "fc.bias")
    channels = len(p["bn0.weight"])
    shape = len(z), channels, *[round((y.shape[1] / channels) ** 0.5)] * 2
    y = add(y.reshape(shape).transpose(0, 2, 3, 1),
            lambda dy: dy.transpose(0, 3, 1, 2).reshape(len(z), -1))
    for i in range(3):
        if i:
            y = add(*conv2d(add(*upsample(y)), p[f"conv{i}.weight"], 1, "x" + need),
                    f"conv{i}.weight")
        gamma, beta = p[f"bn{i}.weight"], p[f"bn{i}.bias"]
        (y, _), back = norm_activation(y, gamma, beta, 0 * beta, 1 + 0 * beta,
                                       activation if i else identity, train=True, need=need)
        y = add(y, back, f"bn{i}.weight", f"bn{i}.bias")
    y = add(*conv2d(y, p["conv3.weight"], 1, "x" + need), "conv3.weight")
    images = add(*sigmoid(add(*add_bias(y, p["conv3.bias"]), "conv3.bias")))
    def back(dy):
        while backs:
            dy = backs.pop()(dy)
        return dy, grads
    return images, back

E_MAC, E_AC = 4.6e-12, 0.9e-12  # joules a float32 multiply-add, add: 45 nm (Horowitz 2014)

def energy(costs, T):
    """Joules per image, (spiking, ANN), from Output.costs. Updates of the neurons are left out, as
    are the residual additions of an ANN. The last layer's input is an average: E_MAC, once."""
    require(costs, "costs must come from a network that ran with measure=True")
    spiking = sum(E_MAC * macs if accumulates is None else E_AC * accumulates * T
                  for _, macs, accumulates in costs)  # Eq. (11)
    return spiking, E_MAC * sum(macs for _, macs, _ in costs)

# ---- 5  Losses: (loss, back), back(dloss=1) -> the gradients of the arguments that carry one -----

def bn_matching(a, mean, var):
    """|mu(a) - mean|_2 + |var(a) - var|_2, a layer of Eq. (3).  a (..., C).   back: dloss -> da."""
    m, count = channel_mean(a), a.size // a.shape[-1]
    gap_mean, gap_var = m - mean, channel_mean((a - m) ** 2) - var
    norm_mean, norm_var = xp.sqrt((gap_mean ** 2).sum()), xp.sqrt((gap_var ** 2).sum())
    def back(dloss=1.0):
        dm = gap_mean / xp.where(norm_mean > 0, norm_mean, 1)  # the gradient of a norm at 0 is 0
        dv = gap_var / xp.where(norm_var > 0, norm_var, 1)
        return (dm + 2 * (a - m) * dv) * (dloss / count)
    return norm_mean + norm_var, back  # Eq. (3)

def class_prior(t, labels=None):
    """mean_b CE(t, y), y constant: labels (B,) or argmax t.   t (B, K).   back: dloss -> dt."""
    log_p, log_back = log_softmax(t)
    y = t.argmax(1) if labels is None else xp.asarray(labels)
    fit = labels is None or y.shape == t.shape[:1] and np.isin(to_host(y), range(t.shape[1])).all()
    require(fit, f"labels must be {len(t)} in 0 .. {t.shape[1] - 1}, of shape {t.shape[:1]}")
    one_hot = (xp.arange(t.shape[1]) == y[:, None]).astype(t.dtype)
    def back(dloss=1.0):
        return log_back(-one_hot * (dloss / len(t)))
    return -(one_hot * log_p).sum() / len(t), back  # Eq. (4)

def balance(t):
    """sum_c p_c log p_c, p = mean_b softmax t (B, K).   back: dloss -> dt."""
    log_q, log_back = log_softmax(t)
    q = xp.exp(log_q)
    p = q.mean(0)
    log_p = xp.log(xp.maximum(p, xp.finfo(p.dtype).tiny))
    def back(dloss=1.0):
        return log_back(q * (log_p + 1) * (dloss / len(t)))
    return (p * log_p).sum(), back  # Eq. (5)

def adversarial(t, s):
    """-mean_b [argmax t = argmax s] KL(softmax t || softmax s), [..] constant, the mean over all B.
    t, s (B, K).   back: dloss -> dt, ds."""
    expect("s", s, *t.shape)
    log_t, log_s = log_softmax(t)[0], log_softmax(s)[0]
    p_t, gap = xp.exp(log_t), log_t - log_s
    kl = (p_t * gap).sum(1, keepdims=True)
    mask = (t.argmax(1) == s.argmax(1)).astype(t.dtype)[:, None]
    def back(dloss=1.0):
        scale = -mask * (dloss / len(t))
        return scale * p_t * (gap - kl), scale * (xp.exp(log_s) - p_t)
    return -(mask * kl).sum() / len(t), back  # Eq. (6)

def rca(f_t, f_s):
    """Relational consistency: mean over pairs i != j of (cos(f_t,i, f_t,j) - cos(f_s,i, f_s,j))^2.
    f_t (B, D), f_s (B, D'), B >= 2.   back: dloss -> df_t, df_s.   Ours, after arXiv 2605.27409."""
    B = len(f_t)
    expect("f_s", f_s, B, None)
    require(B >= 2, "f_t must have at least 2 rows, there is no pair of images in one")
    (c_t, back_t), (c_s, back_s) = cosine_matrix(f_t), cosine_matrix(f_s)
    gap = (c_t - c_s) * (1 - xp.eye(B, dtype=f_t.dtype))
    def back(dloss=1.0):
        dgap = gap * (2 * dloss / (B * (B - 1)))
        return back_t(dgap), back_s(-dgap)
    return (gap ** 2).sum() / (B * (B - 1)), back  # Eq. (7)

@dataclasses.dataclass(frozen=True)
class Tail:
    """The targets of Eq. (8): a normal law, one class in K of it shifted up; mean 0, variance 1."""
    kappa: tuple = (1, 2, 3)     # thresholds, in standard deviations above the mean
    tau: float = 0.25            # softness of the exceedance, in the same unit
    shift: tuple = (0.0, 3.0)    # d, of the class: at the first batch norm, at the last; linear

    @functools.lru_cache
    def targets(self, layers, classes):
        """pi (layers, kappas) = E sigmoid((xi - kappa)/tau), layers in the order of batch_norms,
        xi = (v - E v)/sd, v ~ (1 - p) N(0, 1) + p N(d, 1), p = 1/classes."""
        p, d = 1 / classes, np.linspace(*self.shift, layers)[:, None]
        sd, xi = np.sqrt(1 + p * (1 - p) * d ** 2), np.linspace(-40, 40, 80001)
        v = xi * sd + p * d
        density = (1 - p) * np.exp(-0.5 * v ** 2) + p * np.exp(-0.5 * (v - d) ** 2)
        soft = 0.5 + 0.5 * np.tanh((xi - np.array(self.kappa)[:, None]) / (2 * self.tau))
        pi = density @ soft.T / density.sum(1, keepdims=True)
        pi.flags.writeable = False  # the cache gives it to all
        return pi

def tar(a, gamma, mean, var, pi, kappa=(1, 2, 3), tau=0.25, eps=1e-5):
    """Tail-aware regularisation of a layer: mean_ck (e_ck - pi_k)^2 / (pi_k (1 - pi_k)).
    a (..., C): input of a batch norm of the teacher with weight gamma, running mean and var, (C,).
    e_ck: mean soft exceedance of kappa_k by h, the normalised a, positive towards firing; h = 0
    where gamma = 0. pi: as many as kappa.   back: dloss -> da.   Ours, after arXiv 2605.27409."""
    require(len(pi) == len(kappa), f"pi must be {len(kappa)} numbers, not {pi}")
    count = a.size // a.shape[-1]
    slope = xp.sign(gamma) / xp.sqrt(var + eps)
    h = (a - mean) * slope
    loss, terms = 0.0, []
    for k, target in zip(kappa, map(float, pi)):
        soft = sigmoid((h - k) / tau)[0]
        gap = channel_mean(soft) - target
        weight = 1 / (target * (1 - target) * gap.size * len(kappa))
        loss = loss + (gap ** 2).sum() * weight  # Eq. (8)
        terms.append((soft, 2 * gap * weight))
    def back(dloss=1.0):
        dh = sum(soft * (1 - soft) * dgap for soft, dgap in terms)
        return dh * (slope * (dloss / (tau * count)))
    return loss, back

@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of Eq. (9), rca of (10) too; 0 drops a term. During warm-up adv = rca = 0."""
    bn: float = 1.0      # of (3)
    oh: float = 1.0      # of (4)
    bal: float = 5.0     # of (5)
    adv: float = 1.0     # of (6)
    rca: float = 20.0    # of (7)
    tar: float = 100.0   # of (8)

def synthesis_loss(x, teacher, student=None, weights=Weights(), labels=None, tail=Tail()):
    """How good images are for distillation, and the gradient on them: for any source of images.
    x (B, H, W, 3) in [0, 1], not normalised. teacher, student: Net, run in eval mode on x as the
    teacher normalises it; no student needed where weights.adv = weights.rca = 0. labels: as in
    class_prior. Returns (parts, dtotal/dx): parts has the loss of each field of Weights, not
    weighted, 0.0 where the weight is 0, and "total". To compare terms: dx with other weights 0."""
    expect("x", x, None, None, None, 3)
    require(x.dtype.kind == "f", f"x must hold floats between 0 and 1, not {x.dtype}")
    require(student is not None or not (weights.adv or weights.rca),
            "weights.adv and weights.rca must be 0 where student is None")
    p, layers = teacher.params, batch_norms(teacher.params)
    classes = len(p["linear.bias" if "linear.bias" in p else "classifier.bias"])
    pi = xp.asarray(tail.targets(len(layers), classes), np.float64 if xp is np else x.dtype)
    targets = dict(zip(layers, pi))  # all layers in one copy to a GPU
    channels = sum(p[layer + ".weight"].size for layer in layers)
    parts, found = dict.fromkeys(("bn", "oh", "bal", "adv", "rca", "tar"), 0.0), []
    def tap(layer, a):
        gamma, mean, var = (p[f"{layer}.{v}"] for v in ("weight", "running_mean", "running_var"))
        share = gamma.size / channels  # the mean of Eq. (8) is over the channels of all layers
        if fast(a):
            losses, back = fast_tap(a, gamma, mean, var, targets[layer], weights.bn,
                                    weights.tar, share, tail)
        else:
            bn, bn_back = bn_matching(a, mean, var) if weights.bn else (0.0, lambda dloss: 0.0)
            exceed, tar_back = (tar(a, gamma, mean, var, targets[layer], tail.kappa, tail.tau)
                                if weights.tar else (0.0, lambda dloss: 0.0))
            losses = xp.stack([xp.asarray(loss, a.dtype) for loss in (bn, share * exceed)])
            back = lambda da: da + bn_back(weights.bn) + tar_back(weights.tar * share)
        found.append(losses)
        return back
    if student is not None:
        same_normalisation(teacher, student)
    normal, normal_back = normalise(x, teacher.mean, teacher.std)
    t, t_back = forward(teacher, normal, tap=tap if weights.bn or weights.tar else None, need="x")
    if found:
        parts["bn"], parts["tar"] = sum(found)  # over the layers
    dt, dt_features, dx = xp.zeros_like(t.logits), None, 0
    if weights.oh:
        parts["oh"], back = class_prior(t.logits, labels)
        dt = dt + back(weights.oh)
    if weights.bal:
        parts["bal"], back = balance(t.logits)
        dt = dt + back(weights.bal)
    if weights.adv or weights.rca:
        s, s_back = forward(student, normal, need="x")
        ds, ds_features = xp.zeros_like(s.logits), None
        if weights.adv:
            parts["adv"], back = adversarial(t.logits, s.logits)
            dt_adv, ds = back(weights.adv)
            dt = dt + dt_adv
        if weights.rca:
            parts["rca"], back = rca(t.features, s.features)
            dt_features, ds_features = back(weights.rca)
        dx = s_back(ds, ds_features)[0]
    dx = dx + t_back(dt, dt_features)[0]
    parts["total"] = sum(getattr(weights, k) * loss for k, loss in parts.items())  # Eq. (9)
    return parts, normal_back(dx)

def distillation_loss(t, s, tau=4.0):
    """tau^2 mean_b KL(softmax(t/tau) || softmax(s/tau)), t constant (B, K).   back: dloss -> ds."""
    expect("s", s, *t.shape)
    log_t, log_s = log_softmax(t / tau)[0], log_softmax(s / tau)[0]
    p_t = xp.exp(log_t)
    def back(dloss=1.0):
        return (xp.exp(log_s) - p_t) * (dloss * tau / len(t))
    return tau ** 2 * (p_t * (log_t - log_s)).sum() / len(t), back  # L_kd of Eq. (10)

def rate_matching(z, y, T, v_th, amplitude=1.0):
    """A layer of Eq. (12): mean over neurons and images of (z / A averaged over T - clip(y / V))^2.
    z (T*N, ...): its output in the student, values 0 and amplitude A. y (N, ...): in the teacher,
    constant; V = v_th > 0.   back: dloss -> dz (N, ...), the same at every step."""
    rate = mean_over_time(z, T)[0]
    expect("y", y, *rate.shape)
    gap = rate * (1 / float(amplitude)) - xp.clip(y * (1 / v_th), 0, 1)
    def back(dloss=1.0):
        return gap * (2 * dloss / (gap.size * T * float(amplitude)))
    return (gap * gap).mean(), back  # Eq. (12)

def rate_mapping(z, y, T, v_th, amplitude=1.0, ridge=1e-3):
    """A layer of Eq. (12) between different layers: the least over P (C, C') and b of mean
    (r P + b - clip(y / V))^2 + ridge |P|^2 / C', r: z / A averaged over T.   z (T*N, H, W, C),
    y (N, H, W, C'), the rest as rate_matching. A hint (Romero et al. 2015) by ridge regression:
    without gradient for silent channels, with little where N H W is not far above C."""
    rate = mean_over_time(z, T)[0]
    expect("y", y, *rate.shape[:3], None)
    R, Y = (v.reshape(-1, v.shape[-1]) for v in (rate, xp.clip(y * (1 / v_th), 0, 1)))
    R, Y = (R - R.mean(0)) * (1 / float(amplitude)), Y - Y.mean(0)  # b makes the means equal
    RR, RY = (to_host(R.T @ v / len(R)).astype(np.float64) for v in (R, Y))
    P = xp.asarray(np.linalg.solve(RR + ridge * np.eye(len(RR)), RY), R.dtype)
    gap = R @ P - Y
    def back(dloss=1.0):  # P is the best, so that to change it would change nothing
        dr = gap @ P.T * (2 * dloss / (gap.size * T * float(amplitude)))
        return dr.reshape(rate.shape)
    return (gap * gap).mean() + ridge * (P * P).sum() / P.shape[1], back  # Eq. (12)

def matched_layers(student, teacher):
    """The layers of Eq. (12), twice {of the student: of the teacher}: those of the same name and
    shape; and the last of each at any other resolution that both have, for rate_mapping.
    student, teacher: {layer: output}, from input to output."""
    same = {k: k for k in student if k in teacher and teacher[k].shape[1:] == student[k].shape[1:]}
    met = {student[k].shape[1] for k in same}
    ours, theirs = ({z.shape[1]: k for k, z in net.items()} for net in (student, teacher))
    return same, {ours[n]: theirs[n] for n in ours if n in theirs and n not in met}

# ---- 6  Optimisers: update params and state in place, for every name in grads --------------------

def sgd(params, grads, state, lr, momentum=0.9, nesterov=False, weight_decay=0.0):
    """g += weight_decay p;   v = momentum v + g;   p -= lr (g + momentum v if nesterov else v)."""
    if gpu_update("sgd", params, grads, state, [""], lr, momentum, weight_decay, nesterov):
        return
    for name, g in grads.items():
        g = g + weight_decay * params[name]
        v = state[name] = momentum * state[name] + g if name in state else g
        params[name] -= lr * (g + momentum * v if nesterov else v)

def adam(params, grads, state, lr, betas=(0.9, 0.999), eps=1e-8):
    """p -= lr m / (sqrt v + eps); m, v: bias-corrected means of g and g^2 (Kingma & Ba 2015)."""
    step = state["step"] = state.get("step", 0) + 1
    rates, correct = [1 - beta for beta in betas], [1 - beta ** step for beta in betas]
    if gpu_update("adam", params, grads, state, ["m.", "v."], lr, eps, *rates, *correct):
        return
    for name, g in grads.items():
        moments = "m." + name, "v." + name
        m, v = (state.get(k, 0) for k in moments)
        m, v = m + rates[0] * (g - m), v + rates[1] * (g * g - v)
        state |= zip(moments, (m, v))
        params[name] -= lr * (m / correct[0]) / (xp.sqrt(v / correct[1]) + eps)

def cosine(step, steps, lr, warm_up=0):
    """Learning rate at a step: linear up to lr over warm_up steps, then half a cosine to 0."""
    if step < warm_up:
        return lr * (step + 1) / warm_up
    done = min(1, (step - warm_up) / max(1, steps - warm_up))
    return 0.5 * lr * (1 + float(np.cos(np.pi * done)))

# ---- 7  Data -------------------------------------------------------------------------------------

import argparse, contextlib, ctypes, gzip, hashlib, io, itertools, json, math, pathlib
import shlex, signal, tarfile, time, timeit, urllib.request, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor

class UserError(Exception):
    """An expected failure: one sentence that says what and how to mend it."""

demand = functools.partial(require, error=UserError)

@contextlib.contextmanager
def reading(source, mend):
    """Whatever a damaged file or a server makes a parser raise becomes one sentence about it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", 0) or f"{type(error).__name__} {error}"
        why = "".join(filter(str.isprintable, why.removeprefix("ValueError ")))[:200]
        raise UserError(f"{source} cannot be read ({why}): {mend}") from error

KRIZ = "https://www.cs.toronto.edu/~kriz/"
Dataset = collections.namedtuple("Dataset", "classes size train test mean std url md5 folder "
                                 "train_files test_files", defaults=(None,) * 5)
DATASETS = {  # numbers of classes, rows, images; mean and std of training pixels in [0, 1]; archive
    "cifar10": Dataset(10, 32, 50000, 10000, (.4914, .4822, .4465), (.2470, .2435, .2616),
        KRIZ + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
        [f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]),
    "cifar100": Dataset(100, 32, 50000, 10000, (.5071, .4865, .4409), (.2673, .2564, .2762),
        KRIZ + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
        ["train.bin"], ["test.bin"]),
    "tiny-imagenet": Dataset(200, 64, 100000, 10000, (.4802, .4481, .3975), (.2770, .2691, .2821),
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
        "tiny-imagenet-200", ["val", "train"], ["val"]),
    "shapes": Dataset(10, 32, 10000, 2000, (.5, .5, .5), (.29, .29, .29))}

def find_dataset(name, split, data_dir):
    """Path of a data set's "train" or "test" split; None if absent. UserError: unknown name."""
    if name in ("shapes", "none") or name.endswith(".npz") and os.path.isfile(name):
        return name
    demand(name in DATASETS, f"no data set '{name}': use {', '.join(DATASETS)}, FILE.npz or none")
    known = DATASETS[name]
    folder, archive = (f"{data_dir}/{last}" for last in (known.folder, os.path.basename(known.url)))
    there = all(os.path.exists(f"{folder}/{part}") for part in getattr(known, split + "_files"))
    return folder if there else archive if os.path.isfile(archive) else None

def load_dataset(name, split, data_dir, classes=None, size=None):
    """Split "train" or "test" of a data set in DATASETS, or of an .npz with arrays x_<split> and
    y_<split>, up to 2 GiB: images x (N,32,32,3) or (N,64,64,3) uint8, of that size if given, labels
    y (N,) int64, below classes if given. UserError: absent, damaged, of another form."""
    source, known = find_dataset(name, split, data_dir), DATASETS.get(name)
    if name == "shapes":
        return draw_shapes(getattr(known, split), seed=split == "test")
    demand(name != "none", "no data set was named")
    demand(source, f"{name} is not in {data_dir}: --download it or put {known and known.url} there")
    with reading(source, "delete it and add --download" if known else
                 f"it should hold uint8 images x_{split} (N,{size or 32},{size or 32},3) and "
                 f"labels y_{split} (N,)"):
        if known:
            (classes, size), n = known[:2], getattr(known, split)
            x, y = (_load_tiny if size == 64 else _load_cifar)(known, split, _reader(known, source))
        else:
            x, y = read_npz(source, [f"x_{split}", f"y_{split}"], limit=2**31).values()
            n, classes = len(x), classes or 2**15
            size = size or (64 if x.shape[1:2] == (64,) else 32)
        require(x.dtype == np.uint8 and x.shape == (n, size, size, 3) and y.shape == (n,) and n > 0
                and y.dtype.kind in "iu" and y.min() >= 0 and y.max() < classes,
                f"images {x.dtype} {x.shape}, labels {y.dtype} {y.shape} of {classes}")
    return x, y.astype(np.int64)

def _reader(known, source):
    """read(name, most): the first bytes of a file in the extracted folder or published archive."""
    if os.path.isdir(source):
        return lambda name, most: np.fromfile(f"{source}/{name}", np.uint8, most).tobytes()
    data = pathlib.Path(source).read_bytes() if os.path.getsize(source) <= 260_000_000 else b""
    require(hashlib.md5(data, usedforsecurity=False).hexdigest() == known.md5,
            "it is not the file that was published")  # so what is in it needs no suspicion
    member = (zipfile.ZipFile(io.BytesIO(data)).open if source.endswith(".zip") else
              tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))).extractfile)
    return lambda name, most: member(f"{known.folder}/{name}").read()

def _load_cifar(known, split, read):
    """Records of 1 label byte (CIFAR-100: 2, coarse and fine) and 3 planes of 32x32 bytes."""
    parts, record = getattr(known, split + "_files"), 3073 + (known.classes == 100)
    size = getattr(known, split) // len(parts) * record
    data = [read(part, size + 1) for part in parts]
    require({*map(len, data)} == {size}, f"each of {', '.join(parts)} must have {size} bytes")
    data = np.frombuffer(b"".join(data), np.uint8).reshape(-1, record)
    return data[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), data[:, -3073]

def _load_tiny(known, split, read):
    """64x64 JPEGs; the classes are the WordNet ids in alphabetical order. Needs pillow."""
    with reading("JPEG images", "pip install pillow"):
        from PIL import Image
    text = read("val/val_annotations.txt", 10**6).decode("latin1")
    lines = re.findall(r"^(val_[0-9]+\.JPEG)\t(n[0-9]{8})\t", text, re.M)
    ids, each = sorted({c for _, c in lines}), range(known.train // known.classes)
    require(len(ids) == known.classes, f"val_annotations.txt has {len(ids)} classes")
    files = [(f"val/images/{name}", c) for name, c in lines] if split == "test" else [
        (f"train/{c}/images/{c}_{k}.JPEG", c) for c in ids for k in each]
    x = np.empty((len(files), 64, 64, 3), np.uint8)
    for k, (name, _) in enumerate(files):
        image = Image.open(io.BytesIO(read(name, 10**5)), formats=["JPEG"])
        require(image.size == (64, 64), f"{name} is not 64x64")
        x[k] = image.convert("RGB")
    return x, np.array([ids.index(c) for _, c in files])

def pixel_statistics(x):
    """Mean and standard deviation of each channel of uint8 images, in [0, 1], to four digits."""
    counts, v = np.zeros((3, 256)), np.arange(256) / 255
    for i in range(0, len(x), 1000):
        counts += [np.bincount(c, minlength=256) for c in x[i:i + 1000].reshape(-1, 3).T]
    mean, square = counts @ v / counts[0].sum(), counts @ v ** 2 / counts[0].sum()
    return mean.round(4).tolist(), np.sqrt(np.maximum(square - mean ** 2, 0)).round(4).tolist()

def draw_shapes(n, seed):
    """n images, x (n,32,32,3) uint8, y (n,) int64 of 10 classes: disc, square, triangle, cross,
    ring, frame, crescent, bars, star, dots. Place, size, angle, colours and shading are random."""
    rng = np.random.default_rng([int(seed), 2605])
    y, grid = rng.integers(0, 10, n), np.arange(32) + .5
    place, slope = rng.uniform(11, 21, (2, n, 1, 1)), rng.uniform(-.01, .01, (2, n, 1, 1))
    size, angle = rng.uniform(7, 12, (n, 1, 1)), rng.uniform(-.4, .4, (n, 1, 1))
    back, figure = rng.uniform(0, 1, (2, n, 1, 1, 3))
    figure, x = (back + .25 + .5 * figure) % 1, np.empty((n, 32, 32, 3), np.uint8)
    for k in (slice(i, i + 100) for i in range(0, n, 100)):  # blocks of a size that stays in cache
        i, j = grid[:, None] - place[0, k], grid - place[1, k]
        u = (j * np.cos(angle[k]) + i * np.sin(angle[k])) / size[k]      # right, down: turned,
        v = (i * np.cos(angle[k]) - j * np.sin(angle[k])) / size[k]      # in units of the size
        p, q, r, box = abs(u), abs(v), np.hypot(u, v), np.maximum(abs(u), abs(v))
        outside = np.choose(y[k, None, None], [         # about the distance to a unit outline
            r - .9, box - .8, np.maximum(.87 * p - .5 * v - .45, v - .6),
            np.maximum(np.minimum(p, q) - .25, box - .95), abs(r - .75) - .2, abs(box - .7) - .18,
            np.maximum(r - .95, .75 - np.hypot(u - .4, v)), np.maximum(abs(q - .5) - .2, p - .9),
            .7 * (r - .6 - .38 * np.cos(5 * np.arctan2(u, -v))), np.hypot(p - .5, q - .5) - .33])
        cover = np.clip(.5 - outside * size[k], 0, 1)[..., None]        # edges one pixel wide
        image = back[k] + cover * (figure[k] - back[k])
        image += (slope[0, k] * i + slope[1, k] * j)[..., None] + rng.normal(0, .05, image.shape)
        x[k] = np.clip(255 * image + .5, 0, 255)
    return x, y

def download(url, md5, path, limit, progress=lambda done, total: None, timeout=5.):
    """Writes url to path once it is whole and has the right MD5. progress(bytes, those announced or
    0); timeout: seconds to connect, or without a byte. UserError: no answer, cut, other bytes."""
    data, mend = bytearray(), f"try again later, or put a good copy at {path} yourself"
    with reading(url, mend), urllib.request.urlopen(url, timeout=timeout) as answer:
        total = int(answer.headers.get("Content-Length", 0))
        for block in iter(lambda: answer.read1(1 << 16), b""):
            data += block
            progress(len(data), total)
            require(max(len(data), total) <= limit, f"it has more than {limit} bytes")
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        require(found == md5, f"{len(data)} of {total or 'unknown'} bytes, whose MD5 is {found}")
    write_atomic(path, data)

# ---- 8  Weights and files ------------------------------------------------------------------------

ARCHITECTURES = {  # name: (blocks per stage, width of the first) or (convolutions per stage, width)
    **{f"resnet{6 * n + 2}": ((n, n, n), 16) for n in (1, 2, 3, 5, 7, 9)},
    "resnet18": ((2, 2, 2, 2), 64), "resnet34": ((3, 4, 6, 3), 64),
    "vgg11": ((1, 1, 2, 2, 2), 64), "vgg16": ((2, 2, 3, 3, 3), 64)}

def weight_shapes(arch, classes, width=None, projection=None):
    """{name: shape} of a network. width: channels of its first stage; projection: shortcuts are 1x1
    convolutions, by default in the ResNets of four stages; else option A."""
    require(arch in ARCHITECTURES, f"arch must be one of {', '.join(ARCHITECTURES)}, not {arch!r}")
    stages, default = ARCHITECTURES[arch]
    width, projection = width or default, len(stages) == 4 if projection is None else projection
    blocks, shapes = [stage for stage, n in enumerate(stages) for _ in range(n)], {}
    def add(conv, norm, k, c, size=3):
        shapes[conv + ".weight"] = (k, c, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (k,)
        return k
    if arch.startswith("vgg"):
        c, last = 3, "classifier"
        for i, stage in enumerate(blocks):
            n = 3 * i + stage  # there are convolution, norm and activation, and a pool a stage
            c = add(f"features.{n}", f"features.{n + 1}", width * min(2 ** stage, 8), c)
    else:
        c, last = add("conv1", "bn1", width, 3), "linear"
        for i, stage in enumerate(blocks):
            name, before = f"layer{stage + 1}.{i - blocks.index(stage)}", c
            c = add(name + ".conv1", name + ".bn1", width * 2 ** stage, before)
            add(name + ".conv2", name + ".bn2", c, c)
            if c != before and projection:
                add(name + ".shortcut.0", name + ".shortcut.1", c, before, 1)
    return shapes | {last + ".weight": (classes, c), last + ".bias": (classes,)}

def generator_shapes(size=32, width=128, z_dim=256):
    """{name: shape} of a generator of size x size images, as in CMI and NAYER (their width 128)."""
    require(size % 4 == 0, f"size must be a multiple of 4, not {size}")
    rows, half = width * (size // 4) ** 2, width // 2
    norms = {f"bn{i}.{part}": (k,) for i, k in enumerate((width, width, half))
             for part in ("weight", "bias")}
    return {"fc.weight": (rows, z_dim), "fc.bias": (rows,), **norms,
            "conv1.weight": (width, width, 3, 3), "conv2.weight": (half, width, 3, 3),
            "conv3.weight": (3, half, 3, 3), "conv3.bias": (3,)}

def init_weights(shapes, rng, dtype=np.float32):
    """Weights for {name: shape}, drawn on the host in its order: 1 and 0 for batch norms, He normal
    for convolutions of a teacher or student, else uniform within 1/sqrt(fan in), as PyTorch."""
    def draw(name, shape):
        fan_in = np.prod(shapes.get(name.replace("bias", "weight"), shape)[1:])
        if len(shape) == 1 and fan_in == 1:  # a vector of a batch norm
            return np.full(shape, float(name.endswith(("weight", "var"))))
        if len(shape) == 4 and "fc.weight" not in shapes:
            return rng.normal(0, (2 / fan_in) ** 0.5, shape)
        return rng.uniform(-fan_in ** -0.5, fan_in ** -0.5, shape)
    return {name: xp.asarray(draw(name, shape).astype(dtype)) for name, shape in shapes.items()}

def write_atomic(path, content):
    """Writes bytes, or what content(file) writes: all of it or nothing. UserError: disk full ..."""
    def write():
        temporary, memory = os.path.abspath(f"{path}-{os.urandom(4).hex()}.tmp"), io.BytesIO()
        try:
            if callable(content):  # a zipfile on a full disk would print errors of its own
                content(memory)
            os.makedirs(os.path.dirname(temporary), exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(memory.getbuffer() if callable(content) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): make room or take another "
                            "folder")
        finally:
            with contextlib.suppress(OSError):  # it is there only if something failed
                os.unlink(temporary)
    with ThreadPoolExecutor(1) as writer:  # Ctrl-C interrupts the main thread, which waits for it
        writer.submit(write).result()

def to_json(value):
    """JSON text of value, keys sorted; NumPy and CuPy scalars and arrays become numbers, lists."""
    return json.dumps(value, sort_keys=True, allow_nan=False, default=lambda array: array.tolist())

def rounded(params):
    """params as files hold them, on the host: float16 from two axes on, float32 below."""
    stored = {}
    for name, array in params.items():
        array = np.array(to_host(array), np.float32, order="C")
        demand(np.isfinite(array).all(), f"{name} is not finite: lower the learning rate")
        half = array.ndim > 1 and abs(array).max(initial=0) < 65504
        stored[name] = array.astype(np.float16) if half else array
    return stored

def save_weights(path, params, info):
    """Writes params (name -> array), rounded, and info (a dict for JSON) to one .npz, no pickle.
    Same content, same bytes: sorted; savez dates all 1980. UserError: disk full, not finite."""
    arrays = sorted((rounded(params) | {"info": np.array(to_json(info))}).items())
    write_atomic(path, lambda file: np.savez(file, **dict(arrays)))

def read_npz(path, names=None, limit=2**29):
    """The arrays of an .npz, or those in names: numbers, but text for 'info'; read-only. No pickle;
    memory stays below limit bytes and 20 times the file. To be called within reading(path, ...)."""
    arrays, formats = {}, np.lib.format
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        require(len(entries) == len(archive.infolist()), "it has an entry twice")
        entries = {name: entries[name] for name in names or entries}
        require(sum(entry.file_size for entry in entries.values()) <= limit,
                f"it expands to more than {limit >> 20} MiB")
        for name, entry in entries.items():  # Python expands bzip2 and lzma without bound
            require(entry.compress_type in (0, 8), f"{name} is neither stored nor deflated")
            with archive.open(entry) as file:
                formats.read_magic(file)
                shape, fortran, dtype = formats.read_array_header_1_0(file)  # 2 is of structures
                require(dtype.kind in ("U" if name == "info" else "fiub"), f"{name} is {dtype}")
                array = np.frombuffer(file.read(), dtype)  # raises, as reshape, if sizes disagree
                require(dtype.kind != "U" or array.view(dtype.str[0] + "u4").max(initial=0)
                        <= sys.maxunicode, f"{name} has characters that do not exist")
                arrays[name] = array.reshape(shape, order="F" if fortran else "C")
    return arrays

def load_weights(path, arch=None, classes=None):
    """Reads a network: params (our name -> float32 array) and info (arch, classes, ...).
    path: .npz, ours or of a public checkpoint, or .safetensors; up to 512 MiB, 4 times in memory.
    UserError: not readable, not finite, no arch or another than given. Names and shapes are
    for check_weights, moving the arrays to a GPU is for the caller; the commands use load_net."""
    with reading(path, "take another file (for PyTorch checkpoints see the README)"):
        require(os.path.getsize(path) <= 2**29, "it has more than 512 MiB")
        if os.fspath(path).endswith(".safetensors"):
            with reading(path, "write it again, or pip install safetensors"):
                from safetensors import safe_open
            with safe_open(path, "np") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                weights["info"] = (file.metadata() or {}).get("info", "{}")
        else:
            weights = read_npz(path)
        with reading(path, "its entry 'info' should be a JSON object"):
            info, params = dict(json.loads(str(weights.pop("info", "{}")))), {}
        for name, array in public_names(weights).items():
            require(array.dtype.kind == "f", f"{name} is {array.dtype}")
            require(float(abs(array).max(initial=0)) < 3e38, f"{name} is not finite")
            require("running_var" not in name or array.min(initial=0) >= 0, f"{name} is negative")
            params[name] = np.array(array, np.float32)
        linear = [k for k, v in params.items() if k[-7:] == ".weight" and v.size and v.ndim == 2]
        require(len(linear) == 1, f"it has {len(linear)} linear layers, not 1: " +
                ", ".join(linear[:6]))
        for key, value in ("classes", len(params[linear[0]])), ("classes", classes), ("arch", arch):
            require(not value or info.setdefault(key, value) == value,
                    f"its {key} is {info.get(key)}, not {value}")
        require(isinstance(info.get("arch"), str), "it does not say what network it is: add --arch")
    return params, info

def public_names(weights):
    """Our names for those of public checkpoints: without what all begin with (module., model., ..);
    the one linear layer is linear or a VGG's classifier, downsample is shortcut, the stages and
    blocks of weiaicunzai/pytorch-cifar100 are layer1 .. and conv1, bn1, .., counters go, and VGG's
    conv biases go into the running mean of the batch norm. ValueError: two become one, no name."""
    counters, params = ("num_batches_tracked", "n_averaged"), {}
    weights = {name: a for name, a in weights.items() if not name.endswith(counters)}
    shared = os.path.commonprefix([*weights])
    prefix = re.match(r"((?!(features|layer\d|conv1|bn1)\.)\w+\.)*", shared)[0]
    weights = {name[len(prefix):]: array for name, array in weights.items()}
    linear = [n[:-6] for n, a in weights.items() if n.endswith(".weight") and a.ndim == 2]
    last = "classifier." if "features.0.weight" in weights else "linear."
    names = {"^" + re.escape(name): last for name in linear if len(linear) == 1}
    names |= {"downsample": "shortcut", r"conv1\.0\.": "conv1.", r"conv1\.1\.": "bn1."}
    names |= {f"conv{i + 1}_x": f"layer{i}" for i in range(1, 5)}
    names |= {r"residual_function\.0": "conv1", r"residual_function\.1": "bn1",
              r"residual_function\.3": "conv2", r"residual_function\.4": "bn2"}
    for name, array in weights.items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        require(name not in params and name.isprintable() and len(name) < 200,
                f"an array has two names, or none to speak of: {name}")
        params[name] = array
    for name in [n for n in params if re.fullmatch(r"features\.\d{1,4}\.bias", n)]:
        conv, mean = name[:-4] + "weight", f"features.{int(name[9:-5]) + 1}.running_mean"
        if np.ndim(params.get(conv)) == 4 and np.shape(params.get(mean)) == params[name].shape:
            params[mean] = np.subtract(params[mean], params.pop(name), dtype=np.float64)
    return params

def check_weights(params, expected, path="the file"):
    """params in the order of expected (name -> shape); UserError lists all that does not fit."""
    there = {name: array.shape for name, array in params.items()}
    wrong = [f"{name} {there.get(name, 'is missing')}, not {expected.get(name, 'known')}"
             for name in sorted(expected | there, key=(expected.keys() & there).__contains__)
             if there.get(name) != expected.get(name)]
    wrong[8:] = [f"{len(wrong) - 8} more"] * (len(wrong) > 8)
    demand(not wrong, f"{path} does not fit ({'; '.join(wrong)}): check --arch, the data set and "
                      "the names of the layers")
    return {name: params[name] for name in expected}

# ---- 9  Procedures -------------------------------------------------------------------------------

def flag(default, help, commands="dteb", choices=(), least=None, most=10**6):
    """A field of Config, and a flag of the commands that begin with the letters in commands."""
    least = int(type(default) is int) if least is None else least
    return dataclasses.field(default=default, metadata=locals())

VERSION = 13  # of what runs compute and checkpoints hold; a checkpoint of another is refused
METHODS = {"bn": (0, 0), "bn+rca": (1, 0), "bn+tar": (0, 1), "stars": (1, 1), "real": (0, 0)}
SCHEDULES = {"shapes": dict(epochs=10, warm_up=3, synthesis_steps=12, distill_steps=40, batch=64),
             "quick": dict(epochs=26, warm_up=16, synthesis_steps=25, distill_steps=60, batch=64),
             "scratch": dict(epochs=26, warm_up=16, synthesis_steps=25, distill_steps=240, batch=64,
                             distill_batch=16),  # from random weights, more steps of fewer images
             "full": dict(epochs=220, warm_up=20, synthesis_steps=10, distill_steps=400, batch=256)}
STARTS = {"teacher": dict(lr=0.01, reset="soft", lam=1.0, v_init=0.5),
          "random": dict(lr=0.1, reset="hard", lam=0.5, v_init=0.0)}
HERE = {*"data_dir download device out json quiet threads resume".split()}  # they change no number

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The flags are made from it, and each run writes it down."""
    file: str = flag("", "a saved network, .npz or .safetensors", "e")
    dataset: str = flag("cifar10", f"{', '.join(DATASETS)}, FILE.npz or, to distil, none")
    data_dir: str = flag("data", "folder of the data sets")
    download: bool = flag(False, "fetch the data set where it is missing")
    device: str = flag("auto", "auto: the GPU if one works", choices=("auto", "cpu", "gpu"))
    seed: int = flag(0, "seed of everything random", least=0, most=2**63)
    out: str = flag("", "folder of a run; default runs/<dataset>-<method>-s<seed>, -<arch>-teacher")
    json: bool = flag(False, "end stdout with one JSON object")
    quiet: bool = flag(False, "no progress")
    tf32: bool = flag(False, "let a GPU multiply in TF32: faster, less exact")
    threads: int = flag(0, "worker threads on the CPU; default one for each core")
    teacher: str = flag("", "file of the ANN, .npz or .safetensors; default a shipped one", "d")
    arch: str = flag("", "of the ANN", choices=("", *ARCHITECTURES))
    student_arch: str = flag("", "of the SNN; default as the teacher", "db", ("", *ARCHITECTURES))
    width: int = flag(0, "channels of its first stage; default the teacher's, or the usual", "dt")
    mean: str = flag("", "of the images, as .49,.48,.45, where the file has none", "de")
    std: str = flag("", "likewise", "de")
    size: str = flag("", "their height and width, where no file says", "d", ("", "32", "64"))
    T: int = flag(0, "time steps of the SNN; default 4, or as in the file", "deb", most=1000)
    batch: int = flag(0, "images a step; default by command and schedule")
    distill_batch: int = flag(0, "of the student; default by schedule, or as --batch", "d")
    epochs: int = flag(0, "default by command and schedule", "dt")
    schedule: str = flag("auto", "auto: full on a GPU, else quick, or scratch from random weights",
                         "d", ("auto", *SCHEDULES))
    synthesis_steps: int = flag(0, "generator steps an epoch; default by schedule", "d")
    distill_steps: int = flag(0, "student steps an epoch; default by schedule", "d")
    warm_up: int = flag(0, "first epochs, for the generator alone; default by schedule; as many as "
                        "--epochs: the teacher is converted, not trained", "d")
    method: str = flag("stars", "real: the training set; all: a table", "d", (*METHODS, "all"))
    synthesis: str = flag("generator", "what makes the images", "d", ("generator", "pixels"))
    init: str = flag("", "default teacher, or random if the student differs", "d", ("", *STARTS))
    seeds: int = flag(1, "repeat with seed, seed + 1, ...", "d")
    resume: str = flag("", "go on with the run in this folder", "dt")
    w_bn: float = flag(Weights.bn, "weight of Eq. (3)", "d")
    w_oh: float = flag(Weights.oh, "weight of Eq. (4)", "d")
    w_bal: float = flag(Weights.bal, "weight of Eq. (5)", "d")
    w_adv: float = flag(Weights.adv, "weight of Eq. (6)", "d")
    w_rca: float = flag(Weights.rca, "weight of Eq. (7), in (9) and in (10)", "d")
    w_tar: float = flag(Weights.tar, "weight of Eq. (8), in (9)", "d")
    w_rate: float = flag(300.0, "weight of Eq. (12), in (10)", "d")
    tau_kd: float = flag(4.0, "temperature of Eq. (10)", "d", least=1e-3)
    lr: float = flag(0.0, "default 0.1 for random weights, 0.01 for a teacher's", "dt", least=1e-9)
    weight_decay: float = flag(5e-4, "of the network that is trained", "dt")
    lr_generator: float = flag(2e-3, "of Adam; for pixels 25 times that", "d", least=1e-9)
    generator_width: int = flag(64, "channels of the generator", "db", least=2)
    z_dim: int = flag(256, "size of the generator's latents", "db")
    lam: float = flag(-1.0, "leak; default 1 from the teacher, 0.5 random", "d", most=1)
    reset: str = flag("", "default soft from the teacher, hard random", "d", ("", "hard", "soft"))
    v_init: float = flag(-1.0, "u_0 / V; default 0.5 from the teacher, 0 random", "d")
    reset_gradient: str = flag("", "through the spike in the reset; default yes from the teacher, "
                               "if T > 4, else no", "d", ("", "no", "yes"))
    surrogate: str = flag(Neuron.surrogate, "of Eq. (2)", "d", tuple(SURROGATES))
    quantile: float = flag(0.97, "of a layer's activations in the teacher, to be V", "d", most=1)

def settle(c):
    """c with every "default by ..." replaced by what it stands for."""
    auto = "shapes" if c.dataset == "shapes" else "full" if xp is not np else (
        "quick" if c.init == "teacher" else "scratch")
    new = SCHEDULES[c.schedule.replace("auto", auto)] | STARTS[c.init] | dict(schedule=auto, T=4)
    new["distill_batch"] = c.batch or new.get("distill_batch", new["batch"])
    new["reset_gradient"] = "yes" if c.init == "teacher" and c.T > 4 else "no"
    convert = c.init == "teacher" and c.warm_up > 0  # if asked for, the warm-up may be all
    if c.epochs:
        new["warm_up"] = min(new["warm_up"], max(1, c.epochs // 2))
    c = dataclasses.replace(c, **{k: v for k, v in new.items() if vars(c)[k] == getattr(Config, k)})
    demand(c.warm_up < c.epochs + convert,
           f"--epochs {c.epochs} must be more than --warm-up {c.warm_up}")
    demand(min(c.batch, c.distill_batch) > 1, "--batch, --distill-batch must be 2 or more")
    return c

def draw_augmentation(rng, n, pad=4):
    """Random (offsets, flips) for n images, from a numpy Generator."""
    return rng.integers(0, 2 * pad + 1, (n, 2)), rng.random(n) < 0.5

def synthesis_step(params, state, z, labels, augmentation, teacher, student, weights, lr):
    """One Adam step of a generator on Eq. (9), in place.   -> images before augmentation, parts"""
    images, images_back = generator(params, z)
    x, augment_back = augment(images, *augmentation)
    parts, dx = synthesis_loss(x, teacher, student, weights, labels)
    adam(params, images_back(augment_back(dx))[1], state, lr, betas=(0.5, 0.999))
    return images, parts

def update(net, state, grads, running, lr, weight_decay):
    """One SGD step on all parameters of net that have a gradient, in place, and new statistics."""
    sgd(net.params, grads, state, lr, nesterov=True, weight_decay=weight_decay)
    net.params.update(running)

def classification_step(net, state, x, y, lr, weight_decay):
    """One SGD step of an ANN on Eq. (4) with labels y, in place. x: images in [0, 1].   -> loss"""
    out, back = forward(net, normalise(x, net.mean, net.std)[0], train=True, need="p")
    loss, loss_back = class_prior(out.logits, y)
    update(net, state, back(loss_back())[1], out.running, lr, weight_decay)
    return loss

def distillation_step(student, state, x, teacher, tau, lr, weight_decay, w_rca, w_rate, thresholds):
    """One SGD step of a student on Eq. (10), in place. x: images in [0, 1]; thresholds {layer: V}:
    the layers of the teacher that Eq. (12) may match.   -> the losses kd, rca and rate, not
    weighted, 0.0 where the weight is 0, and "total"."""
    same_normalisation(teacher, student)
    outputs, fired, backs, matches, relations, dfeatures = {}, {}, {}, [], 0.0, None
    normal = normalise(x, teacher.mean, teacher.std)[0]
    t = forward(teacher, normal, need="", watch=outputs.__setitem__ if w_rate else None)[0]
    def watch(layer, z):
        fired[layer] = z
        return lambda: backs.pop(layer)(w_rate / matched) if layer in backs else None
    s, back = forward(student, normal, train=True, watch=w_rate and watch, need="p")
    same, mapped = matched_layers(fired, {k: outputs[k] for k in outputs if k in thresholds})
    matched = max(1, len(same) + len(mapped))
    for layer, its in (same | mapped).items():
        match = (rate_mapping if layer in mapped else
                 fast_rate_matching if fast(fired[layer]) else rate_matching)
        loss, backs[layer] = match(fired.pop(layer), outputs.pop(its), student.T, thresholds[its],
                                   student.params.get(layer + ".amplitude", 1.0))
        matches.append(loss)
    fired.clear()
    outputs.clear()
    rate = sum(matches) / matched
    kd, kd_back = distillation_loss(t.logits, s.logits, tau)
    if w_rca:
        relations, rca_back = rca(t.features, s.features)
        dfeatures = rca_back(w_rca)[1]
    total = kd + w_rca * relations + w_rate * rate  # Eq. (10)
    update(student, state, back(kd_back(), dfeatures)[1], s.running, lr, weight_decay)
    return dict(kd=kd, rca=relations, rate=rate, total=total)

def crops(rng, x):
    """uint8 images on the host -> float32 images in [0, 1] on the device, shifted and flipped."""
    return augment(xp.asarray(x).astype(np.float32) / 255, *draw_augmentation(rng, len(x)))[0]

def predict(net, x, batch=256, **mode):
    """Logits (N, K) on the host of uint8 images x, and the Output of each batch. mode as resnet."""
    require(x.dtype == np.uint8, f"x must be uint8, not {x.dtype}")
    batches = (xp.asarray(x[i:i + batch]).astype(np.float32) for i in range(0, len(x), batch))
    outputs = [forward(net, normalise(images / 255, net.mean, net.std)[0], need="", **mode)[0]
               for images in batches]
    logits = np.concatenate([to_host(out.logits) for out in outputs])
    demand(np.isfinite(logits).all(), "logits are not finite: train with a lower learning rate")
    return logits, outputs

def evaluate(net, x, y, batch=256):
    """Accuracy and, for a spiking net, firing rates and Eq. (11), as means over uint8 images x."""
    expect("y", y, len(x))
    logits, outputs = predict(net, x, batch, measure=True)
    rates = {k: sum(len(o.logits) * o.rates[k] for o in outputs) / len(x) for k in outputs[0].rates}
    uj, ann = sum(len(o.logits) * np.array(energy(o.costs, net.T)) for o in outputs) / len(x) * 1e6
    return dict(accuracy=float((logits.argmax(1) == y).mean()), n=len(x), firing_rates=rates,
                firing_rate=float(np.mean([*rates.values()])) if rates else None,
                energy_uj=float(uj) if rates else None, ann_energy_uj=float(ann))

def first_student(c, rng, teacher, shapes, thresholds):
    """The student before its first step. --init teacher: the weights that fit, and V = A."""
    params = init_weights(shapes, rng)
    if c.init == "random":
        return params
    fit = {k: v.copy() for k, v in teacher.params.items() if np.shape(params.get(k)) == v.shape}
    return params | fit | {f"{layer}.{part}": V for layer, V in thresholds.items()
                           if layer + ".weight" in fit for part in ("v_th", "amplitude")}

def synthesise(c, params, state, rng, nets, weights, size, real):
    """Yields (images on the device, parts of Eq. (9)); drawn from the uint8 images real, if any."""
    if len(real):
        for i in rng.integers(len(real), size=(c.synthesis_steps, c.batch)):
            yield xp.asarray(real[i], np.float32) / 255, dict(total=0.0)
        return
    pixel_state, v = {}, xp.asarray(rng.normal(0, .3, (c.batch, size, size, 3)), np.float32)
    for step in range(c.synthesis_steps):
        z = xp.asarray(rng.normal(0, 1, (c.batch, c.z_dim)), np.float32)
        crop = draw_augmentation(rng, c.batch)
        if c.synthesis == "generator":
            yield synthesis_step(params, state, z, None, crop, *nets, weights, c.lr_generator)
            continue
        images, images_back = sigmoid(v)
        x, augment_back = augment(images, *crop)
        parts, dx = synthesis_loss(x, *nets, weights)
        lr = cosine(step, c.synthesis_steps, 25 * c.lr_generator)
        adam({"v": v}, {"v": images_back(augment_back(dx))}, pixel_state, lr)
    if c.synthesis == "pixels":
        yield sigmoid(v)[0], parts

def symptoms(teacher, x, rates):
    """Sentences on a collapsed generator, by its uint8 images x, and on silent layers."""
    counts = np.bincount(predict(teacher, x)[0].argmax(1))
    return [f"no neuron of {layer} ever fires" for layer, rate in rates.items() if rate == 0] + [
        sentence for sentence, seen in (
            (f"nearly all synthetic images are class {counts.argmax()}", max(counts) > .9 * len(x)),
            ("the synthetic images are all the same, or have no content",
             min(x.std(0).mean(), x.std((1, 2)).mean()) < 1)) if seen]

def distil(c, teacher, shapes, size, folder, cost, real=()):
    """STARS: teacher Net -> student Net, agreement with it (not of real), pool of images, metrics.
    Goes on from the checkpoint in folder, if there is one. The pool (batches, batch, S, S, 3) of
    8-bit images lies in pool.bin; a sixteenth of each batch is held out, to measure agreement."""
    rng, held, on = np.random.default_rng(c.seed), max(1, c.batch // 16), METHODS[c.method]
    both = Weights(c.w_bn, c.w_oh, c.w_bal, c.w_adv, c.w_rca * on[0], c.w_tar * on[1])
    params, moments = init_weights(generator_shapes(size, c.generator_width, c.z_dim), rng), {}
    groups = dict(generator=params, adam=moments, student={}, sgd={})
    neuron = Neuron(c.lam, c.reset, c.v_init, c.surrogate, c.reset_gradient == "no")
    student = teacher._replace(params=groups["student"], activation=neuron, T=c.T)
    path, steps = os.path.join(folder, "pool.bin"), (c.epochs - c.warm_up) * c.distill_steps
    nets, batches = (teacher, student), 1 if c.synthesis == "pixels" else c.synthesis_steps
    ripe = c.warm_up // 2 * batches * (c.synthesis == "generator")  # what came before is not used
    def pool(epochs):
        with reading(path, "start a new run"):
            return np.memmap(path, np.uint8, "r", shape=(epochs * batches, c.batch, size, size, 3))
    def agreement(images):  # evaluate(student), its accuracy the share that are the teacher's class
        x = images[:, :held].reshape(-1, size, size, 3)[-2048:]
        return evaluate(student, x, predict(teacher, x, c.batch)[0].argmax(1), c.batch)
    def work(epoch, row, warnings):
        warm = epoch < c.warm_up
        weights = dataclasses.replace(both, adv=0.0, rca=0.0) if warm else both
        with open(path, "ab") as file:  # what an unfinished epoch added goes
            kept = epoch * batches * c.batch * size * size * 3
            demand(file.tell() >= kept, f"{path} is too short: start a new run")
            file.truncate(kept)
            for x, parts in synthesise(c, params, moments, rng, nets, weights, size, real):
                file.write(to_host((x * 255 + 0.5).astype(np.uint8)).tobytes())
                yield "warm-up" if warm else "synthesis", parts
            file.flush()
            os.fsync(file.fileno())
        row |= {f"grad_{k}": float(xp.linalg.norm(  # of each term in use, at weight 1
            synthesis_loss(x[:32], *nets, Weights(*one))[1]))
            for (k, weight), one in zip(vars(weights).items(), np.eye(6).tolist()) if weight}
        images, V = pool(epoch + 1), {}
        def threshold(layer, z):  # a quantile of every seventh activation of the teacher
            V[layer] = max(1e-3, float(np.quantile(to_host(z.ravel()[::7]), c.quantile)))
        predict(teacher, images[min(epoch + 1, c.warm_up) * batches - 1], c.batch, watch=threshold)
        if epoch == c.warm_up - 1:
            groups["student"].update(first_student(c, rng, teacher, shapes, V))
        for step in range(0 if warm else c.distill_steps):
            i = (rng.integers(ripe, len(images), c.distill_batch),
                 rng.integers(held, c.batch, c.distill_batch))
            lr = cosine((epoch - c.warm_up) * c.distill_steps + step, steps, c.lr, steps // 20)
            losses = distillation_step(student, groups["sgd"], crops(rng, images[i]), teacher,
                                       c.tau_kd, lr, c.weight_decay, both.rca, c.w_rate, V)
            yield "distillation", {f"student_{k}": loss for k, loss in losses.items()}
        found = {}
        with contextlib.suppress(UserError):  # each_epoch says better what is not finite
            found = {} if warm else agreement(images[-32:])
        row |= {"agreement": found["accuracy"]} if found and c.method != "real" else {}
        row["images_seen"] = max(0, epoch + 1 - c.warm_up) * c.distill_steps * c.distill_batch
        warnings += symptoms(teacher, images[-1], found.get("firing_rates", {}))
    plan = [{"warm-up": batches}] * c.warm_up + [
        {"synthesis": batches, "distillation": c.distill_steps}] * (c.epochs - c.warm_up)
    inputs = [*teacher.params.values(), *teacher.mean, *teacher.std, *real]
    rows = each_epoch(c, folder, groups, rng, inputs, plan, work, cost)
    student = student._replace(params=on_device(rounded(student.params)))
    found = None if c.method == "real" else agreement(pool(c.epochs)[ripe:])["accuracy"]
    return student, found, pool(c.epochs), rows

def train(c, net, x, y, folder):
    """Train an ANN in place on uint8 images x (N, H, W, 3), labels y (N,): SGD, crop and flip."""
    rng, groups = np.random.default_rng(c.seed + 1), dict(net=net.params, sgd={})
    steps = len(x) // c.batch
    def work(epoch, row, warnings):
        order = rng.permutation(len(x))[:steps * c.batch].reshape(steps, c.batch)
        for step, i in enumerate(order, epoch * steps):
            lr = cosine(step, c.epochs * steps, c.lr, min(steps, 400))
            yield "step", dict(loss=classification_step(net, groups["sgd"], crops(rng, x[i]), y[i],
                                                        lr, c.weight_decay))
    each_epoch(c, folder, groups, rng, (x, y), [dict(step=steps)] * c.epochs, work, dict(step=1))

def each_epoch(c, folder, groups, rng, inputs, plan, work, cost):
    """Run the epochs that the checkpoint lacks.   -> the lines of metrics.jsonl
    groups {group: {name: array}}, rng: all that an epoch changes; inputs: what it is made from.
    work(epoch, row, warnings) fills both, and yields (kind, {name: loss}) after each step;
    plan: {kind: steps} of each epoch; cost: {kind: of a step, in any unit}, for the time left."""
    path, rows = os.path.join(folder, "checkpoint.npz"), []
    digest = hashlib.sha256(b"".join(to_host(v).tobytes() for v in inputs)).hexdigest()
    run = {k: v for k, v in vars(c).items() if k not in HERE} | dict(version=VERSION, inputs=digest)
    if os.path.exists(path):
        with reading(path, "start a new run"):
            arrays = read_npz(path, limit=2**34)
            info = json.loads(str(arrays.pop("info")))
            require(info["arrays"] == [*arrays], "arrays are missing")
            same_run(path, info["settings"], run)
            for k, v in arrays.items():
                group, _, name = k.partition("/")
                groups[group][name] = xp.array(v) if v.ndim else v.item()
            rows, rng.bit_generator.state = info["rows"], info["rng"]
    total = sum(cost[kind] * n for steps in plan[len(rows):] for kind, n in steps.items())
    start, shown, done = time.monotonic(), 0, 0
    for epoch in range(len(rows), c.epochs):
        history, row, warnings, then = collections.defaultdict(list), {}, [], time.monotonic()
        for kind, losses in work(epoch, row, warnings):
            now, done = time.monotonic(), done + cost[kind]
            pace = (now - start) / done  # seconds for a unit of cost
            left = f"{pace * (total - done) / 60:.1f} min left"
            for name, loss in losses.items():
                history[name].append(loss)
            if now > max(shown + 0.5, start + 2):
                tell(c, f"epoch {epoch + 1}/{c.epochs}  {kind} {len(history[name])} of "
                        f"{plan[epoch][kind]}, {pace * cost[kind]:.2g} s each, {left}", shown > 0)
                shown = now
        arrays = {f"{group}/{k}": to_host(v) for group in groups for k, v in groups[group].items()}
        for name, values in (history | {k: [np.sum(v)] for k, v in (row | arrays).items()}).items():
            finite = np.isfinite([*map(float, values)])
            k = finite.argmin()
            demand(finite.all(), f"{name} became {float(values[k])} in epoch {epoch + 1}, step "
                   f"{k + 1}: lower the learning rate" +
                   f"; {path} holds the state after epoch {epoch}" * (epoch > 0))
        row |= {k: float(sum(v)) / len(v) for k, v in history.items()}
        losses = "  ".join(f"{k} {v:.3g}" for k, v in row.items() if "grad" not in k)
        for warning in {*warnings}.difference(*(old["warnings"] for old in rows)):
            tell(dataclasses.replace(c, quiet=False), f"warning: {warning}")
        rows.append(row | dict(epoch=epoch + 1, warnings=warnings, seconds=time.monotonic() - then))
        write_atomic(f"{folder}/metrics.jsonl", "\n".join([*map(to_json, rows), ""]).encode())
        info = to_json(dict(settings=run, rows=rows, rng=rng.bit_generator.state, arrays=[*arrays]))
        write_atomic(path, lambda file: np.savez(file, **arrays, info=np.array(info)))
        tell(c, f"epoch {epoch + 1}/{c.epochs}  {losses}  ({rows[-1]['seconds']:.0f} s, {left})")
    return rows

def same_run(path, was, now):
    """UserError that lists what differs, unless all settings in now are so in was."""
    differ = [f"{k} was {was.get(k)}, not {v}" for k, v in now.items() if was.get(k) != v]
    demand(not differ, f"{path} is of another run ({'; '.join(differ)}): omit these or start anew")

# ---- 10  Reports ---------------------------------------------------------------------------------

def tell(c, text, passing=False):
    """A line on stderr, unless --quiet; a passing one, on a terminal, which the next replaces."""
    terminal = sys.stderr.isatty()
    if not c.quiet and (terminal or not passing):
        print("\r\033[K" * terminal + text, end="\n" * (not passing), file=sys.stderr, flush=True)

def percent(fraction):
    return "unknown" if fraction is None else f"{100 * fraction:.2f} %"

def draw(folder, pool, rows):
    """synthetic.png, curves.png of a run; nothing where matplotlib is not installed."""
    with contextlib.suppress(ImportError):
        from matplotlib import figure, image
        grid = np.vstack([np.hstack(batch) for batch in pool[-8:, :16].repeat(2, 2).repeat(2, 3)])
        write_atomic(f"{folder}/synthetic.png", lambda file: image.imsave(file, grid, format="png"))
        names = [k for k in rows[-1] if k not in ("epoch", "seconds", "images_seen", "warnings")]
        page = figure.Figure(figsize=(12, 2.2 * -(-len(names) // 4)), layout="constrained")
        for i, name in enumerate(names):
            axes = page.add_subplot(-(-len(names) // 4), 4, i + 1, title=name, xlabel="epoch")
            axes.plot(*zip(*((row["epoch"], row[name]) for row in rows if name in row)))
        write_atomic(f"{folder}/curves.png", page.savefig)

def run_bench(c):
    """Median seconds of a step of each kind, method stars, random weights and images. gflops: of
    the distillation step, 2 a multiply-add, back twice forward; peak_mib: growth of memory."""
    rng, arch, B = np.random.default_rng(c.seed), c.arch or "resnet20", c.batch or 128
    demand(B > 1, "--batch must be 2 or more")
    before, crop, momenta, state = linux_says("VmRSS:"), draw_augmentation(rng, B), {}, {}
    ann = Net(init_weights(weight_shapes(arch, 10), rng))
    snn = Net(init_weights(weight_shapes(c.student_arch or arch, 10), rng), Neuron(), c.T or 4)
    params = init_weights(generator_shapes(32, c.generator_width, c.z_dim), rng)
    V, weights, nets = dict.fromkeys(batch_norms(ann.params), 1.0), Weights(), (ann, snn)
    x, z = (xp.asarray(rng.random(shape, np.float32)) for shape in ((B, 32, 32, 3), (B, c.z_dim)))
    result = dict(
        distill_step_s=lambda: distillation_step(snn, momenta, augment(x, *crop)[0], ann, 4, 0.05,
                                                 5e-4, weights.rca, Config.w_rate, V),
        synthesis_step_s=lambda: synthesis_step(params, state, z, None, crop, *nets, weights, 1e-3),
        teacher_forward_s=lambda: forward(ann, x, need=""),
        student_forward_s=lambda: forward(snn, x, train=True, need=""))
    for name, job in result.items():  # to_host waits for a GPU
        result[name] = np.median(timeit.repeat(lambda: (job(), to_host(z)), number=1, repeat=9)[2:])
    rate = B / result["distill_step_s"]
    result |= dict(images_per_s=rate, gflops=rate * (macs(ann, 32) + 3 * macs(snn, 32)) * 2e-9,
                   peak_mib=xp.get_default_memory_pool().total_bytes() / 2 ** 20 if xp is not np
                   else (linux_says("VmHWM:") - before) / 1024 if before else None)
    print(*(f"{k:20} {v and format(v, '.4g')}" for k, v in result.items()), sep="\n")
    return result

def linux_says(key):
    """KiB of this process that Linux tells under the name of key, 0 where it tells nothing."""
    with contextlib.suppress(OSError, TypeError), open("/proc/self/status") as file:
        return int(re.search(key + r"\s*(\d+)", file.read())[1])
    return 0

def macs(net, size):
    """Multiply-adds of the network for an image of size x size, forward, over its time steps."""
    x = xp.zeros((1, size, size, 3), np.float32)
    first, *others, last = (n for _, n, _ in forward(net, x, need="", measure=True)[0].costs)
    return first + net.T * sum(others) + last

# ---- 11  Command line ----------------------------------------------------------------------------

def on_device(arrays):
    """What a file holds as params of a Net: float32 on the device, V and A as numbers."""
    return {k: xp.asarray(v, np.float32) if v.ndim else float(v) for k, v in arrays.items()}

def load_net(c, path):
    """A saved network as (Net, info), its normalisation from the file, a flag or the data set."""
    (params, info), known, constants = load_weights(path, c.arch), DATASETS.get(c.dataset), []
    with reading(path, "check --dataset, --arch, and --mean and --std, as .49,.48,.45"):
        for key, here in zip(("dataset", "classes", "size"), known and (c.dataset, *known) or ()):
            there = info.get(key, here)  # "none": of a network made by --dataset none
            require(there in (here, "none"), f"{key} {there}, not {here}")
        width = len(params.get("conv1.weight", params.get("features.0.weight", ())))
        expected = weight_shapes(info["arch"], info["classes"], width, "shortcut" in str([*params]))
        expected |= {k: () for k in params if k.endswith((".v_th", ".amplitude"))}
        params = on_device(check_weights(params, expected, path))
        for part, least in ("mean", -9), ("std", 1e-6):
            flag = [float(v) for v in getattr(c, part).split(",") if v]
            value = [*map(float, info.get(part) or flag or getattr(known, part, ()))]
            fit = flag in ([], value) and len(value) == 3 and all(least < v < 9 for v in value)
            require(fit, f"its {part} is {','.join(map(str, value)) or 'not known'}")
            constants.append(tuple(value))
        T, neuron = info.get("T", 1), Neuron(**info.get("neuron", {}))
        require(T in range(1, 1001) and np.isfinite(neuron.v_init), f"{neuron}, T {T}")
        numbers = [v for v in params.values() if type(v) is float]  # V and A
        require("neuron" in info or not numbers, "an ANN has no v_th")
        require(min(numbers, default=1) > 0, "a v_th or amplitude is not positive")
        return Net(params, neuron if "neuron" in info else relu, int(T), *constants), info

def save_net(path, net, c, command, arch, classes, **info):
    """Save net, what is known of it, and the command that makes the same file again."""
    flags = shlex.join(word for k, v in vars(c).items() for word in (
        "--" + k.replace("_", "-"), *[str(v)] * (v is not True))
                       if k in ("dataset", "seed") or k not in HERE and v != getattr(Config, k))
    info |= dict(arch=arch, classes=classes, mean=net.mean, std=net.std, dataset=c.dataset)
    save_weights(path, net.params, info | dict(command=f"python stars.py {command} {flags}"))

def shipped(c):
    """Path of the teacher for c.dataset and c.arch in data/ beside this file."""
    paths = sorted(pathlib.Path(__file__).resolve().with_name("data").glob("*-teacher.npz"))
    fits = [str(path) for path in paths if path.name.startswith(f"{c.dataset}-{c.arch}")]
    demand(fits, f"{c.dataset} {c.arch} is not shipped, but {', '.join(p.stem for p in paths)}: "
                 "give --teacher FILE, or train one by python stars.py teacher")
    return fits[0]

def data_of(c, split, classes=None, size=None):
    """(x, y) of c.dataset, fetched first where it is missing and --download was given."""
    if c.download and find_dataset(c.dataset, split, c.data_dir) is None:
        url, md5 = DATASETS[c.dataset].url, DATASETS[c.dataset].md5
        tell(c, f"downloading {url}")
        download(url, md5, f"{c.data_dir}/{os.path.basename(url)}", 260_000_000, lambda done, total:
                 tell(c, f"{done >> 20} of {total >> 20} MiB", passing=True))
    return load_dataset(c.dataset, split, c.data_dir, classes, size)

def measured(c, classes, size, *nets):
    """evaluate() of each net on the test set; where there is none, {} and a sentence on stderr."""
    try:
        x, y = data_of(c, "test", classes, size)
    except UserError as error:
        tell(c, f"no accuracy can be measured: {error}")
        return [{} for net in nets]
    return [evaluate(net, x, y, c.batch) for net in nets]

def alone_with(file):
    """False if another process holds the open file; else this one does, until it is closed. Where
    there are no such locks, True."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        return not isinstance(error, BlockingIOError)
    return True

@contextlib.contextmanager
def run_folder(c, command, name):
    """Gives the folder of a run, a new one unless --resume; what ends it says how to go on."""
    names = (f"runs/{name}" + f"-{i}" * (i > 1) for i in itertools.count(1))
    folder = c.resume or c.out or next(k for k in names if not os.path.exists(k))
    again = shlex.join(["python", os.path.relpath(__file__), command, "--resume", folder])
    path = f"{folder}/config.json"
    if not c.resume:
        try:
            # an empty one will do, but for what a killed run left; two runs cannot both make one
            empty = os.path.exists(folder) and all(k.endswith(".tmp") for k in os.listdir(folder))
            os.makedirs(folder, exist_ok=empty)
        except OSError as error:
            raise UserError(f"{folder} cannot be a new folder ({error.strerror}): give another "
                            f"--out, or go on by {again}") from None
        write_atomic(path, to_json(vars(c) | dict(command=command, version=VERSION)).encode())
    with open(path, "r+") as file:  # to write, or NFS has no lock
        demand(alone_with(file), f"another process is at work in {folder}: wait for it, or end it")
        for left in pathlib.Path(folder).glob("*-????????.tmp"):  # by a killed run
            with contextlib.suppress(OSError):
                left.unlink()
        try:
            yield folder
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; to go on: {again}") from None
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; make room, then {again}") from error

def resumed(given, command):
    """The settings of the run in the folder given["resume"], which no other flag may contradict."""
    path = os.path.join(given["resume"], "config.json")
    with reading(path, "name the folder of a run"), open(path) as file:
        was, now = json.load(file), given | dict(command=command, version=VERSION)
        same_run(path, was, {k: v for k, v in now.items() if k not in HERE})
        own = HERE - {"data_dir", "device"} | {"command", "version"}  # not from the run that ended
        c = Config(**{k: v for k, v in was.items() if k not in own} | given)
        wrong = [f.name for f, v in zip(dataclasses.fields(c), vars(c).values())
                 if type(v) is not f.type or v != f.default and not fits(f, v)]
        require(not wrong, f"what it says of {', '.join(wrong)} cannot be")
        return c

def run_distil(c):
    """Teacher -> spiking student, without data (the default)."""
    if c.method == "all" or c.seeds > 1:
        methods = [*METHODS][:4] if c.method == "all" else [c.method]
        try:
            return dict(rows=[run_distil(dataclasses.replace(c, method=method, seed=seed, seeds=1))
                              for seed in range(c.seed, c.seed + c.seeds) for method in methods])
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(str(stop) and f"{stop} (with this run alone)") from None
    source, known = c.teacher or shipped(c), DATASETS.get(c.dataset)
    teacher, info = load_net(c, source)
    demand(teacher.activation is relu, f"{source} is a spiking network: the teacher must be an ANN")
    arch, classes = c.student_arch or info["arch"], info["classes"]
    shapes = own = {k: v.shape for k, v in teacher.params.items()}
    if c.student_arch or c.width:
        projection = None if c.student_arch else "shortcut" in str([*own])
        shapes = weight_shapes(arch, classes, c.width, projection)
    c = settle(dataclasses.replace(c, init=c.init or ("teacher" if shapes == own else "random")))
    size = known.size if known else info.get("size") or int(c.size or 0)
    demand(str(size) in ("32", "64"), "the size of the images is not known: add --size 32 or 64")
    demand(c.size in ("", str(size)), f"--size must be {size} here, not {c.size}")
    real = data_of(c, "train", classes, size)[0] if c.method == "real" else ()
    device = "cpu" if xp is np else "gpu"
    draft = Net(init_weights(shapes, np.random.default_rng(0)), Neuron(), c.T)
    t, s, g = macs(teacher, size), macs(draft, size), 21 * (c.generator_width * size) ** 2
    cost = {"warm-up": 2 * t + g, "synthesis": 2 * t + 2 * s + g,
            "distillation": (t + 3 * s) * c.distill_batch / c.batch}
    then = f" and, after {c.warm_up}, {c.distill_steps} distillation" * (c.warm_up < c.epochs)
    with run_folder(c, "distill", f"{pathlib.Path(c.dataset).stem}-{c.method}-s{c.seed}") as folder:
        tell(c, f"{info['arch']} -> spiking {arch}, T = {c.T}, started from {c.init} weights, "
                f"method {c.method}, schedule {c.schedule} on the {device}: {c.epochs} epochs of "
                f"{c.synthesis_steps} synthesis{then} steps; into {folder}")
        student, agreement, pool, rows = distil(c, teacher, shapes, size, folder, cost, real)
        path = f"{folder}/student.npz"
        save_net(path, student, c, "distill", arch, classes, size=size, T=c.T,
                 neuron=vars(student.activation))
        draw(folder, pool, rows)
        row = dict(method=c.method, seeds=[c.seed], device=device, student=path, accuracy=None,
                   schedule=c.schedule, agreement=agreement,
                   seconds=sum(epoch["seconds"] for epoch in rows))
        found, ann = measured(c, classes, size, student, teacher)
        said = info.get("accuracy") if c.dataset in ("none", info.get("dataset")) else None
        row |= found | dict(teacher_accuracy=ann.get("accuracy", said))
        write_atomic(f"{folder}/summary.json", to_json(row).encode())
    print(f"{c.method:7} seed {c.seed}  {path}: student {percent(row['accuracy'])}, teacher "
          f"{percent(row['teacher_accuracy'])}, agreement on synthetic images {percent(agreement)}")
    return row

def run_teacher(c):
    """Train an ANN on a data set."""
    (x, y), stem = data_of(c, "train"), pathlib.Path(c.dataset).stem
    known = DATASETS.get(c.dataset) or Dataset(int(y.max()) + 1, x.shape[1], len(x), 0,
                                               *pixel_statistics(x))
    arch, epochs = ("resnet8", 8) if c.dataset == "shapes" else ("resnet20", 40)
    c = dataclasses.replace(c, arch=c.arch or arch, epochs=c.epochs or epochs, lr=c.lr or 0.1,
                            batch=min(c.batch or 128, len(x)))
    shapes = weight_shapes(c.arch, known.classes, c.width)
    params = init_weights(shapes, np.random.default_rng(c.seed))
    net, name = Net(params, relu, 1, known.mean, known.std), f"{stem}-{c.arch}-teacher"
    with run_folder(c, "teacher", name) as folder:
        tell(c, f"training {c.arch} on {len(x)} images, {c.epochs} epochs, into {folder}")
        train(c, net, x, y, folder)
        net, path = net._replace(params=on_device(rounded(net.params))), f"{folder}/{name}.npz"
        found = measured(c, known.classes, known.size, net)[0].get("accuracy")
        save_net(path, net, c, "teacher", c.arch, known.classes, size=known.size, accuracy=found)
    print(f"{c.arch} on {c.dataset}: accuracy {percent(found)}; {path}")
    return dict(accuracy=found, teacher=path)

def run_eval(c):
    """Measure a saved network on the test set."""
    net, info = load_net(c, c.file)
    demand(net.activation is not relu or not c.T, f"{c.file} is an ANN: leave --T out")
    net = net._replace(T=c.T or net.T)
    x, y = data_of(c, "test", info["classes"], info.get("size"))
    found = evaluate(net, x, y, c.batch or 256)
    spiking = "" if found["energy_uj"] is None else (
        f", {found['energy_uj']:.1f} uJ spiking, firing rate {percent(found['firing_rate'])}")
    print(f"{c.file}: accuracy {percent(found['accuracy'])} on {found['n']} images; energy an "
          f"image {found['ann_energy_uj']:.1f} uJ as an ANN{spiking}",
          *(f"  {k:20} {percent(rate)}" for k, rate in found["firing_rates"].items()), sep="\n")
    return found

COMMANDS = dict(distill=run_distil, teacher=run_teacher, eval=run_eval, bench=run_bench)

def fits(field, v):
    """Whether a field of Config can be v."""
    *_, known, least, most = field.metadata.values()
    return v in known if known else isinstance(v, str) or least <= v <= most

def parse(argv):
    """-> command, {field of Config: value} as given. Exits with code 2 for wrong usage."""
    command = "distill" if not argv or argv[0].startswith("-") else argv[0]
    parser = argparse.ArgumentParser(
        f"stars.py {command}", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description=" ".join(f"{k}: {run.__doc__}" for k, run in COMMANDS.items()))
    if command not in COMMANDS:
        parser.error(f"no command {command}: use {', '.join(COMMANDS)}")
    flags = {f.name: f for f in dataclasses.fields(Config) if command[0] in f.metadata["commands"]}
    dashed = lambda name: "--" * (name != "file") + name.replace("_", "-")
    for name, f in flags.items():
        default = f"(default {f.default})" * (f.default not in ("", 0, -1.0))
        about = " ".join([f.metadata["help"], *f.metadata["choices"], default])
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type)
        parser.add_argument(dashed(name), help=about, **kind)
    given = vars(parser.parse_args(argv[argv[:1] == [command]:]))
    c = Config(**given)
    try:
        find_dataset(c.dataset, "test", c.data_dir)
        for name, v in given.items():
            *_, known, least, most = flags[name].metadata.values()
            rule = f"one of {', '.join(filter(None, known))}" if known else f"{least:g} to {most:g}"
            require(fits(flags[name], v), f"{dashed(name)} must be {rule}, not {v}")
        for name, possible, other in (
                ("w_rca", c.method in ("bn+rca", "stars", "all"), "Eq. (7) in --method"),
                ("w_tar", c.method in ("bn+tar", "stars", "all"), "Eq. (8) in --method"),
                ("synthesis", c.method != "real", "a --method that makes images"),
                ("out", c.seeds == 1 and c.method != "all" and not c.resume, "a single, new run")):
            require(possible or name not in given, f"{dashed(name)} needs {other}")
    except (ValueError, UserError) as error:
        parser.error(str(error))
    return command, given

def main(argv=None):
    """Run a command.   -> exit code: 0, 1 expected failure, 2 wrong usage, 130 Ctrl-C"""
    global THREADS
    command, given = parse(sys.argv[1:] if argv is None else argv)
    try:
        c = resumed(given, command) if "resume" in given else Config(**given)
        THREADS = c.threads or THREADS
        use_device(c.device, c.tf32)
        keep_pages()
        result = COMMANDS[command](c)
        if c.json:
            print(to_json(result), flush=True)
    except (UserError, RuntimeError, MemoryError, OSError) as error:
        print(f"stars.py: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends it at once
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    return 0

# ---- 12  Fast paths: skip on first reading -------------------------------------------------------

# bytes of one operand of a chunk; shorter calls would wait for the interpreter, if it has a lock
CHUNK_BYTES = 1 << (20 if getattr(sys, "_is_gil_enabled", lambda: True)() else 19)
_pool = ThreadPoolExecutor(64)

def cores():
    """Worker threads to use: the cores this process may use, over the threads of a BLAS call;
    1 where numpy came first and BLAS has threads of its own."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = file.read().split()
        n = min(n, max(1, int(quota) // int(period)))
    blas = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return max(1, n // max(1, int(blas) if blas.isdigit() else 1 if _ours else n))

THREADS = cores()

def parallel(function, n, chunk):
    """[function(i, j) for consecutive ranges of `chunk` in n], on THREADS threads, in order."""
    results = [None] * -(-n // chunk)
    todo = [None] * THREADS + [*range(len(results))][::-1]  # pop() is atomic; None ends a thread
    def work():
        for k in iter(todo.pop, None):
            results[k] = function(k * chunk, min(n, (k + 1) * chunk))
    others = [_pool.submit(work) for _ in range(min(THREADS, len(results)) - 1)]
    work()
    for other in others:  # one that has not begun never needs to: after a fork none can
        if not other.cancel():
            other.result()
    return results

def keep_pages():
    """glibc: hand freed arrays to the next ones; page faults would cost a quarter of a step."""
    with contextlib.suppress(OSError, AttributeError):
        for option, value in (-4, 0), (-1, -1), (-2, 1 << 26):  # no mmap, no trim, grow by 64 MiB
            ctypes.CDLL("libc.so.6").mallopt(option, value)

def images_a_chunk(x, chunk):
    """About four chunks or more, whatever the threads."""
    return chunk or max(1, min(-(-len(x) // 4), CHUNK_BYTES // x[0].nbytes))

# -- convolution: each of the two ways returns what it does with a chunk of images:
#    forward(x, y), backward(x, dy, dx) -> a part of dw, and gather(sum of parts) -> dw
def fast_conv2d(x, w, stride=1, need="xp", chunk=None):
    """conv2d of section 2: Winograd for 3x3, stride 1 and even H, else im2col a chunk."""
    three = w.shape[2:] == (3, 3) and stride == 1 and x.shape[1] % 2 == 0
    N, *sizes = len(x), *(-(-n // stride) for n in x.shape[1:3]), len(w)
    forward, backward, gather = (_winograd if three else _im2col)(w, stride, need)
    y = np.empty((N, *sizes), w.dtype)
    chunk = images_a_chunk(x if x.size > y.size else y, chunk)
    parallel(lambda i, j: forward(x[i:j], y[i:j]), N, chunk)
    shape, kept = x.shape, x if "p" in need else np.empty((N, 0))
    def back(dy):
        dx = np.empty(shape, dy.dtype)
        dw = parallel(lambda i, j: backward(kept[i:j], dy[i:j], dx[i:j]), N, chunk)
        return (dx if "x" in need else None,
                np.ascontiguousarray(gather(sum(dw[1:], dw[0]))) if "p" in need else None)
    return y, back

def _im2col(w, stride, need):
    (K, C, R, S), P, Q = w.shape, w.shape[2] // 2, w.shape[3] // 2
    flat = np.ascontiguousarray(w.transpose(2, 3, 1, 0).reshape(-1, K))
    margins = (0, 0), (P, P), (Q, Q), (0, 0)
    def windows(padded):  # (n, h, v, R, S, C)
        view = np.lib.stride_tricks.sliding_window_view(padded, (R, S), (1, 2), writeable=True)
        return view[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)
    columns = lambda x: windows(np.pad(x, margins)).reshape(-1, R * S * C)
    forward = lambda x, y: np.matmul(columns(x), flat, out=y.reshape(-1, K))
    def backward(x, dy, dx):
        d = dy.reshape(-1, K)
        if "x" in need:  # the adjoint of columns
            padded = np.pad(np.zeros_like(dx), margins)
            into = windows(padded)
            dwindows = (d @ flat.T).reshape(into.shape)
            for r, s in np.ndindex(R, S):
                into[:, :, :, r, s] += dwindows[:, :, :, r, s]
            dx[...] = padded[:, P:P + dx.shape[1], Q:Q + dx.shape[2]]
        return columns(x).T @ d if "p" in need else None
    return forward, backward, lambda dw: dw.reshape(R, S, C, K).transpose(3, 2, 0, 1)

# 3x3, stride 1: Winograd's F(2, 3) down the rows (4 products for 2 rows of output, not 6). Rows lie
# flat with one zero pixel between them, so three neighbouring pixels are 3C numbers in a line, and
# every third such line starts where the last one ends: the matrices of pixels 0, 3, 6 ..,
# 1, 4, 7 .. and 2, 5, 8 .. are views, and nothing is expanded.

def _planes(pixels, x, most):
    """Planes (4, n, H/2, W + 1, C) for x (n, H, W, C), zeros around them, and a view of their lines
    (4, 3, blocks, rows <= most, pixels * C): line (p, i) has pixel p + 3 i and those beside it."""
    n, H, W, C = x.shape
    used = n * H // 2 * (W + 1)
    blocks = -(-used // (3 * most))
    rows = -(-used // (3 * blocks))
    buffer = np.empty((4, 3 * blocks * rows + 2, C), x.dtype)
    buffer[:, 0], buffer[:, used + 1:] = 0, 0
    plane, pixel, number = buffer.strides
    return buffer[:, 1:used + 1].reshape(4, n, H // 2, W + 1, C), np.lib.stride_tricks.as_strided(
        buffer[:, 1 - pixels // 2:], (4, 3, blocks, rows, pixels * C),
        (plane, pixel, 3 * rows * pixel, 3 * pixel, number))

def _taps(x, most):
    """B'x as lines of three pixels: x0 - x2, x1 + x2, x2 - x1, x1 - x3 of rows 2i - 1 .. 2i + 2."""
    (n, H, W, C), (planes, lines) = x.shape, _planes(3, x, most)
    odd, even = np.empty((2, n, H // 2 + 1, W + 1, C), x.dtype)
    odd[:, 0], even[:, -1], odd[:, :, -1], even[:, :, -1] = 0, 0, 0, 0
    odd[:, 1:, :-1], even[:, :-1, :-1] = x[:, 1::2], x[:, 0::2]
    x0, x1, x2, x3 = odd[:, :-1], even[:, :-1], odd[:, 1:], even[:, 1:]
    np.subtract(x0, x2, out=planes[0])
    np.add(x1, x2, out=planes[1])
    np.subtract(x2, x1, out=planes[2])
    np.subtract(x1, x3, out=planes[3])
    return lines

def _kernel(w):
    """w (K, C, 3, 3) -> (4, 1, 1, 3C, K)."""
    g0, g1, g2 = w.transpose(2, 3, 1, 0).reshape(3, -1, w.shape[0])
    return np.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2])[:, None, None]

def _products(taps, kernel, y, most):
    """The four products m, combined to even rows m0 + m1 + m2 and odd m1 - m2 - m3 of y (A').
    OpenBLAS takes products of few rows without packing them, up to twice as fast."""
    (m0, m1, m2, m3), lines = _planes(1, y, most)
    np.matmul(taps, kernel, out=lines)
    m0 += m1
    m1 -= m2
    np.add(m0[:, :, :-1], m2[:, :, :-1], out=y[:, 0::2])
    np.subtract(m1[:, :, :-1], m3[:, :, :-1], out=y[:, 1::2])

def _pairs(dy, most):
    """A dy, but for a sign, as lines of one pixel: e, e + o, e - o, o of even and odd rows."""
    (e, total, difference, o), lines = _planes(1, dy, most)
    e[:, :, -1], o[:, :, -1] = 0, 0
    e[:, :, :-1], o[:, :, :-1] = dy[:, 0::2], dy[:, 1::2]
    np.add(e, o, out=total)
    np.subtract(e, o, out=difference)
    return lines

def _winograd(w, stride, need):
    most = 4096 // max(w.shape[:2]) if max(w.shape[:2]) <= 64 else 2 ** 31  # see _products
    kernel = _kernel(w)
    turned = _kernel(w[:, :, ::-1, ::-1].swapaxes(0, 1)) if "x" in need else None
    forward = lambda x, y: _products(_taps(x, most), kernel, y, most)
    def backward(x, dy, dx):
        taps = _taps(dy, most)
        if "x" in need:
            _products(taps, turned, dx, most)
        if "p" in need:  # x in place of dy, and dy of x: it gives dw turned around
            return np.matmul(taps.swapaxes(3, 4), _pairs(x, most)).sum((1, 2))
    def gather(dw):
        a, b, c, d = dw
        dw = np.stack([a + (b + c) / 2, (b - c) / 2, (b + c) / 2 - d])
        return dw.reshape(3, 3, *w.shape[:2])[::-1, ::-1].transpose(2, 3, 0, 1)
    return forward, backward, gather

# -- batch norm + activation: arrays as (N, D) of whole images, so that inner loops are long

def _row(value, v):
    """A number for each channel -> one for each of the D numbers of an image in v (.., D)."""
    return np.tile(value.astype(v.dtype), v.shape[-1] // len(value))

def _sum(v, C):
    """Sum of v over all but its C channels, in float64; v contiguous."""
    rows = v.reshape(-1, C * math.gcd(v.size // C, 64))
    return (np.ones(len(rows), v.dtype) @ rows).reshape(-1, C).sum(0, dtype=np.float64)

def moments(y, chunk=None):
    """Mean and biased variance a channel, from sums about the mean of the first image."""
    C, v, count = y.shape[-1], y.reshape(len(y), -1), y.size // y.shape[-1]
    guess = v[0].reshape(-1, C).mean(0)
    row = _row(guess, v)
    def part(i, j):
        e = v[i:j] - row
        return np.array([_sum(e, C), _sum(e * e, C)])
    mean, square = sum(parallel(part, len(y), images_a_chunk(y, chunk))) / count
    return guess + mean, np.maximum(square - mean ** 2, 0)

FAST_SLOPES = {relu: 0.0, leaky_relu: 0.2, identity: 1.0}

def fast_can(a, gamma, beta, mean, var, activation, T, v_th, first, shortcut):
    """Whether fast_norm_activation covers the case: wrong arguments are left to the formulas."""
    fits = ({v.shape for v in (gamma, beta, mean, var)} == {a.shape[-1:]} and a.size > a.shape[-1]
            and (xp is np or a.ndim == 4 and T <= 32 and
                 a.size * (T if first else 1) < 2 ** 31 - 2 ** 18))
    if isinstance(activation, Neuron):
        return (fits and v_th > 0 and T >= 1 and
                (shortcut is None if first else len(a) % T == 0))
    return fits and activation in FAST_SLOPES and T == 1

def fast_norm_activation(a, gamma, beta, mean, var, activation, T, v_th, amplitude, first, shortcut,
                         train, need="p", chunk=None, momentum=.1, eps=1e-5):
    """norm_activation of section 4 without a pass over memory for each of its operators.
    Keeps a, z and the shortcut; membranes are computed again."""
    dtype, C, count, running = a.dtype, a.shape[-1], a.size // a.shape[-1], (mean, var)
    if train:
        mean, var = moments(a, chunk)
        running = tuple(((1 - momentum) * old + momentum * new).astype(dtype)
                        for old, new in zip(running, (mean, var * (count / (count - 1)))))
    inv = 1 / np.sqrt(np.float64(var) + eps)
    v = a.reshape(1 if first else T, -1, a[0].size)  # (T or 1, N, D)
    z = np.empty((T, *v.shape[1:]), dtype)
    kept = None if shortcut is None else shortcut.reshape(z.shape)
    scale, shift = _row(gamma * inv, v), _row(beta - gamma * inv * mean, v)
    chunk = images_a_chunk(v[0], chunk)
    def drive(t, i, j, out):  # batch norm and shortcut
        np.multiply(v[t % len(v), i:j], scale, out=out)
        out += shift
        if kept is not None:
            out += kept[t, i:j]
        return out
    if isinstance(activation, Neuron):
        lam, v_th, hard = activation.lam, float(v_th), activation.reset == "hard"
        surrogate = SURROGATES[activation.surrogate][1]
        def membranes(i, j):  # before reset, step by step, as in lif
            carried = lam * activation.v_init * v_th
            for t in range(T):
                if t:
                    carried = u * (u < v_th) if hard else u - (u >= v_th) * dtype.type(v_th)
                    carried *= lam
                u = drive(t, i, j, np.empty_like(z[t, i:j]))
                u += carried
                yield u
        def forward(i, j):
            for t, u in enumerate(membranes(i, j)):
                np.multiply(u >= v_th, dtype.type(amplitude), out=z[t, i:j])
        def activation_back(i, j, dz, dv):
            u, du = [*membranes(i, j)], dv[:, i:j]
            for t in reversed(range(T)):
                np.multiply(dz[t], amplitude / v_th, out=du[t])
                dkept = lam * du[t + 1] if t + 1 < T else dtype.type(0)
                if not activation.detach_reset:
                    du[t] -= dkept * (u[t] * (1 / v_th)) if hard else dkept
                du[t] *= surrogate(u[t] * (1 / v_th) - 1)
                if t + 1 < T:
                    du[t] += dkept * (u[t] < v_th) if hard else dkept
            if len(v) < T:
                dv[0, i:j] = du.sum(0)
    else:
        slope = dtype.type(FAST_SLOPES[activation])
        def forward(i, j):
            y = drive(0, i, j, z[0, i:j])
            np.maximum(y, y * slope, out=y)
        def activation_back(i, j, dz, dv):
            np.maximum(z[0, i:j] > 0, slope, out=dv[0, i:j])
            dv[0, i:j] *= dz[0]
    parallel(forward, v.shape[1], chunk)
    def back(dz, each=None):
        dz, dv = dz.reshape(z.shape), np.empty_like(z)
        each = None if each is None else each.reshape(z[0].shape)
        da = dv[:len(v)] if kept is None else np.empty_like(v)
        def part(i, j):
            more = dz[:, i:j] if each is None else dz[:, i:j] + each[i:j]
            activation_back(i, j, more, dv)
            steps = zip(dv[:, i:j], v[:, i:j]) if train or "p" in need else ()
            sums = sum(([_sum(d, C), _sum(d * x, C)] for d, x in steps), np.zeros((2, C)))
            np.multiply(dv[:len(v), i:j], scale, out=da[:, i:j])
            return sums
        dbeta, dgamma = sum(parallel(part, v.shape[1], chunk))
        dgamma = (dgamma - mean * dbeta) * inv
        if train:
            k = gamma * inv / count
            linear, offset = _row(-k * dgamma * inv, v), _row(k * (dgamma * inv * mean - dbeta), v)
            def finish(i, j):
                da[:, i:j] += v[:, i:j] * linear + offset
            parallel(finish, v.shape[1], chunk)
        params = (dgamma.astype(dtype), dbeta.astype(dtype)) if "p" in need else (None, None)
        return da.reshape(a.shape), *params, None if kept is None else dv.reshape(shortcut.shape)
    return (z.reshape(-1, *a.shape[1:]), running), back

def fast_tap(a, gamma, mean, var, pi, w_bn, w_tar, share, tail, chunk=None):
    """A layer of Eq. (3) and (8), from sums of y, the normalised a, of y^2 and of the tanh of (8).
    -> (l_bn, share l_tar), 0 without their weights; back: da -> da, to which the gradient of
    w_bn l_bn + w_tar share l_tar was added"""
    C, v, count = a.shape[-1], a.reshape(len(a), -1), a.size // a.shape[-1]
    width, levels = 2 * tail.tau, [k / (2 * tail.tau) for k in tail.kappa] if w_tar else []
    if xp is not np:
        return gpu_tap(a, gamma, mean, var, pi, w_bn, w_tar, share, width, levels)
    sd, chunk = np.sqrt(var + var.dtype.type(1e-5)), images_a_chunk(a, chunk)
    scale, shift, turn = (_row(x, v) for x in (1 / sd, -mean / sd, np.sign(gamma) / width))
    def normal(i, j):  # y, and the tanh for each level: sigmoid(2 x) = (1 + tanh x) / 2
        y = v[i:j] * scale + shift
        h = y * turn if levels else y
        return y, (np.tanh(t, out=t) for t in (h - level for level in levels))
    def part(i, j):
        y, tanhs = normal(i, j)
        return np.array([_sum(y, C), _sum(y * y, C), *(_sum(t, C) for t in tanhs)])
    m, square, *tails = sum(parallel(part, len(a), chunk)) / count
    gaps = np.stack([m * sd, (square - m * m) * sd * sd - var])
    norms = np.sqrt((gaps ** 2).sum(1, keepdims=True))
    l_bn, l_tar = norms.sum() if w_bn else 0.0, 0.0
    if levels:
        pi = np.asarray(pi)[:, None]
        d = 0.5 + 0.5 * np.stack(tails) - pi
        l_tar = (d ** 2 / (pi * (1 - pi))).mean()
    def back(da):
        dm, dv = gaps / np.where(norms > 0, norms, 1) * w_bn
        dsums = [dm * sd - 2 * m * dv * sd * sd, dv * sd * sd]
        dsums += [*(w_tar * share / d.size * d / (pi * (1 - pi)))] if levels else []
        dsums, dv = np.stack(dsums) / count, np.ascontiguousarray(da).reshape(v.shape)
        tilt = dsums[2:] * np.sign(gamma) / width / sd
        linear, constant = _row(2 * dsums[1] / sd, v), _row(dsums[0] / sd + tilt.sum(0), v)
        weights = [_row(-x, v) for x in tilt]
        def part(i, j):
            y, tanhs = normal(i, j)
            y *= linear
            y += constant
            for t, weight in zip(tanhs, weights):  # (1 - tanh^2) tilt
                y += t * t * weight
            dv[i:j] += y
        parallel(part, len(a), chunk)
        return dv.reshape(a.shape)
    return np.array([l_bn, share * l_tar]), back

def fast_rate_matching(z, y, T, v_th, amplitude=1.0, chunk=None):
    """Eq. (12) as rate_matching of section 5."""
    v, gap = z.reshape(T, *y.shape), xp.empty(y.shape, y.dtype)
    def part(i, j):
        np.multiply(v[:, i:j].sum(0), 1 / (T * float(amplitude)), out=gap[i:j])
        gap[i:j] -= np.clip(y[i:j] * (1 / v_th), 0, 1)
        return np.vdot(gap[i:j], gap[i:j])
    if xp is np:
        loss = sum(parallel(part, len(y), images_a_chunk(y, chunk))) / gap.size
    else:
        parts = xp.empty(min(gap.size, GPU_THREADS), y.dtype)
        launch("rate", parts.size, v, y, gap, parts, gap.size, 1 / (T * float(amplitude)),
               1 / float(v_th), T=T)
        loss = parts.sum()
    return loss, lambda dloss: gap * (2 * dloss / (gap.size * T * float(amplitude)))

# -- GPU: i is the number of a thread, n how many there are. e is x - mean, y normalised; sizes are
#    compiled in, arrays contiguous.

# In PTX: x rounded to TF32, or cut (plus half, rounded, but NaN may not stay NaN); D (16, 8) +=
# A (16, 8) B (8, 8), spread over the 32 threads of a warp; a copy of n numbers to shared memory,
# zeros unless inside, that goes on while the thread does; its end.
DEVICE = """
#define bits(x) __float_as_uint(x)
__device__ float nearest(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}
__device__ float cut(float x, unsigned half) {
    return __uint_as_float(bits(x) + half & 0xffffe000);
}
__device__ void mma(float* d, const float* a, const float* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b[0])),
          "r"(bits(b[1])));
}
template <int n> __device__ void copy(float* to, const float* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(
        (unsigned) __cvta_generic_to_shared(to)), "l"(from), "n"(4 * n), "r"(inside ? 4 * n : 0)
        : "memory");
}
__device__ void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
"""

NORM = """int c = i % C;
    real inv = rsqrt(var[c] + real(1e-5)), sign = gamma[c] > 0 ? 1 : gamma[c] < 0 ? -1 : 0;"""

STEPS = """
    real u = start;
    for (int t = 0; t < T; t++) {
        real drive = gamma[c] * inv * (a[FIRST ? i : t * size + i] - mean[c]) + beta[c];
        if (SHORTCUT) drive += shortcut[t * size + i];
        u = lam * u + drive;
        %s
        if (u >= V) u = HARD ? 0 : u - V;
    }"""

TABLE = "real* const* __restrict__ table, int rows, "
EACH_ROW = """
    for (auto row = table, end = table + rows * WIDTH; row < end; row += WIDTH)
        for (size_t first = i, size = size_t(row[WIDTH - 1]); first < size; first += n) {
            size_t i = first;
            real* g = row[0];%s
        }"""

KERNELS = {  # name: (arguments, body)
    # windows (N, h, w, taps), every D pixels, of x (N, H, W, C) with zeros around it and, if U is
    # 2, between its pixels; taps: (C / GROUP, R, S, GROUP). Their product with b (taps, K) or, if
    # DW, that of their transpose with b (N, h, w, K), in parts. A block makes ROWS x BN of y, 16
    # taps or pixels at a time, X warps side by side, each M * 16 rows; b of TF32 is rounded before,
    # but for DW; swap, LINE: a memory bank serves one thread
    "windows": ("in x, in b, out y, int pixels, int span", """
        const int TAPS = R * S * C, J = BN / X / 8, ROWS = THREADS / X / 2 * M;
        const int WIDE = DW ? ROWS : 16, LINE = WIDE + (DW ? 8 : 0), LINE_B = BN + 8;
        alignas(16) __shared__ float A[2][ROWS * 16 / WIDE * LINE], B[2][16 * LINE_B];
        int rows = DW ? TAPS : pixels, down = (rows + ROWS - 1) / ROWS, across = (K + BN - 1) / BN;
        int i0 = blockIdx.x / across % down * ROWS, j0 = blockIdx.x % across * BN;
        int part = blockIdx.x / (across * down), begin = part * span;
        int end = min(DW ? pixels : TAPS, begin + span), thread = threadIdx.x;
        int group = thread % 32 / 4, member = thread % 4, warp = thread / 32;
        int wi = warp / X * M * 16 + group, wj = warp % X * (BN / X);
        float sum[M][J][4] = {};
        auto load = [&](unsigned k0, float* A, float* B) {
            unsigned at = thread * VA % WIDE;  // the same for all u: WIDE divides THREADS VA
            for (int u = 0; u < ROWS * 16 / THREADS / VA; u++) {
                unsigned line = thread * VA / WIDE + u * (THREADS * VA / WIDE);
                unsigned swap = DW ? 0 : line / 2 % 4 * 4;
                unsigned p = (DW ? k0 : i0) + line, q = (DW ? i0 : k0) + at;
                unsigned row = p / w % h * D + q / (GROUP * S) % R - R / 2;  // huge, not negative
                unsigned column = p % w * D + q / GROUP % S - S / 2;
                unsigned c = q / (GROUP * S * R) * GROUP + q % GROUP;
                bool inside = p < pixels && q < TAPS && row < H * U && column < W * U &&
                              row % U == 0 && column % U == 0;
                size_t pixel = (p / (w * h) * H + row / U) * W + column / U;
                copy<VA>(A + line * LINE + (at ^ swap), x + (pixel * C + c), inside);
            }
            for (int u = 0; u < BN * 16 / VB; u += THREADS) {
                unsigned e = (u + thread) * VB, k = k0 + e / BN, j = j0 + e % BN;
                if (BN * 16 % (THREADS * VB) == 0 || e < BN * 16)
                    copy<VB>(B + e / BN * LINE_B + e % BN, b + (size_t(k) * K + j),
                             k < end && j < K);
            }
        };
        load(begin, A[0], B[0]);
        for (int k0 = begin, at = 0; k0 < end; k0 += 16, at ^= 1) {
            copied();
            __syncthreads();
            if (k0 + 16 < end) load(k0 + 16, A[at ^ 1], B[at ^ 1]);
            float a[2][2][M][4], b[2][2][J][2];  // TF32, and of float32 what it leaves: if one is
            #pragma unroll                       // rounded, what both leave is of either sign
            for (int step = 0; step < 2; step++) {
                for (int m = 0; m < M; m++)
                    for (int v = 0; v < 4; v++) {
                        int i = wi + m * 16 + v % 2 * 8, k = step * 8 + member + v / 2 * 4;
                        float x = A[at][DW ? k * LINE + i : i * LINE + (k ^ group / 2 * 4)];
                        a[step][0][m][v] = TF32 ? nearest(x) : cut(x, DW ? 0x1000 : 0);
                        a[step][1][m][v] = cut(x - a[step][0][m][v], 0);
                    }
                for (int j = 0; j < J; j++)
                    for (int v = 0; v < 2; v++) {
                        int k = step * 8 + member + v * 4;
                        float x = B[at][k * LINE_B + wj + j * 8 + group];
                        b[step][0][j][v] = !TF32 ? cut(x, DW ? 0 : 0x1000) : DW ? nearest(x) : x;
                        b[step][1][j][v] = cut(x - b[step][0][j][v], 0);
                    }
                for (int m = 0; m < M && TF32; m++)  // none waits for the one before it
                    for (int j = 0; j < J; j++) mma(sum[m][j], a[step][0][m], b[step][0][j]);
            }
            for (int m = 0; m < M && !TF32; m++)
                for (int j = 0; j < J; j++) {
                    float d[4] = {};  // tensor cores cut sums, so they add few numbers
                    for (int step = 0; step < 2; step++)
                        mma(d, a[step][1][m], b[step][0][j]), mma(d, a[step][0][m], b[step][1][j]),
                        mma(d, a[step][0][m], b[step][0][j]);
                    for (int v = 0; v < 4; v++) sum[m][j][v] += d[v];
                }
        }
        #pragma unroll
        for (int m = 0; m < M; m++)
            #pragma unroll
            for (int j = 0; j < J; j++)
                #pragma unroll
                for (int v = 0; v < 4; v += K % 2 ? 1 : 2) {
                    int row = i0 + wi + m * 16 + v / 2 * 8;
                    int column = j0 + wj + j * 8 + member * 2 + v % 2;
                    float* to = y + (size_t(part) * rows + row) * K + column;
                    if (row >= rows || column >= K) continue;
                    if (K % 2) *to = sum[m][j][v];
                    else *(float2*) to = make_float2(sum[m][j][v], sum[m][j][v + 1]);
                }"""),
    # weights w (K, C, R, S) as b of "windows"; then, if n > SIZE, the (C, K, R, S) of its adjoint
    "taps": ("in w, out y", """
        bool turned = i >= SIZE;
        int L = turned ? C : K, G = turned ? GROUP_K : GROUP, j = turned ? i - SIZE : i;
        int l = j % L, q = j / L, c = q / (G * S * R) * G + q % G, r = q / (G * S) % R;
        int s = q / G % S;
        int from = turned ? ((c * C + l) * R + R - 1 - r) * S + S - 1 - s
                          : ((l * C + c) * R + r) * S + s;
        y[i] = TF32 ? nearest(w[from]) : w[from];"""),
    # of each channel and every (n / C)-th row, sums of K terms
    "sums": ("in x, in gamma, in mean, in var, out parts, int rows", NORM + """
        real sum[K] = {};
        #pragma unroll 4
        for (int row = i / C; row < rows; row += n / C) {
            real e = x[row * C + c] - mean[c], y = e * inv, term[] = {TERMS};
            for (int k = 0; k < K; k++) sum[k] += term[k];
        }
        for (int k = 0; k < K; k++) parts[k * n + c * (n / C) + i / C] = sum[k];"""),
    # mean and biased variance from sums of e and e^2 about a first guess; next running statistics
    "moments": ("in sums, in guess, in mean, in var, out next, real count, real momentum", """
        real m = sums[i] / count, square = sums[n + i] / count, v = square - m * m;
        v = v < 0 ? 0 : v;
        next[i] = guess[i] + m;
        next[n + i] = v;
        next[2 * n + i] = mean[i] + momentum * (next[i] - mean[i]);
        next[3 * n + i] = var[i] + momentum * (v * (count / (count - 1)) - var[i]);"""),
    # batch norm, shortcut, then Eq. (1) or, if SLOPE >= 0, the larger of x and SLOPE x
    "fire": ("in a, in gamma, in beta, in mean, in var, in shortcut, out z, real lam, real start, "
             "real V, real A", NORM + "int size = n;" + STEPS % """
        z[t * n + i] = SLOPE < 0 ? (u >= V ? A : 0) : drive > 0 ? drive : real(SLOPE) * drive;"""),
    # dz to the gradient of what batch norm gives, Eq. (2), added up over T if FIRST; in eval mode
    # on to that of what it gets; and each thread's sums of dy and of dy y, of one channel
    "fire_back": ("in a, in gamma, in beta, in mean, in var, in shortcut, in dz, in each, out dy, "
                  "out da, out sums, int size, real lam, real start, real V, real A", NORM + """
        real m[T], sum = 0, sum_y = 0, share = 1 / V, slope = A * share;
        for (int first = i; first < size; first += n) {
            int i = first;""" + STEPS % "m[t] = SLOPE < 0 ? u : drive;" + """
            real kept = 0, over_time = 0, more = EACH ? each[i] : 0;
            for (int t = T - 1; t >= 0; t--) {
                int at = FIRST ? i : t * size + i;
                real x = m[t] * share - 1, du = dz[t * size + i] + more;
                if (SLOPE >= 0) du *= m[t] > 0 ? 1 : real(SLOPE);
                else du = (du * slope - (DETACH ? 0 : HARD ? kept * m[t] * share : kept))
                          * (SURROGATE) + (HARD && m[t] >= V ? 0 : kept);
                kept = lam * du;
                over_time += du;
                sum_y += du * (a[at] - mean[c]) * inv;
                if (FIRST) du = over_time;  // of which the last stays
                if (TRAIN || SHORTCUT) dy[at] = du;
                if (!TRAIN) da[at] = gamma[c] * inv * du;
            }
            sum += over_time;
        }
        sums[c * (n / C) + i / C] = sum;
        sums[n + c * (n / C) + i / C] = sum_y;"""),
    # Eq. (12): the rate of spikes less the wanted one, and each thread's share of the loss
    "rate": ("in z, in y, out gap, out parts, int size, real scale, real scale_y", """
        real square = 0;
        for (int j = i; j < size; j += n) {
            real sum = 0, goal = y[j] * scale_y;
            for (int t = 0; t < T; t++) sum += z[size_t(t) * size + j];
            gap[j] = sum * scale - (goal < 0 ? 0 : goal > 1 ? 1 : goal);
            square += gap[j] * gap[j];
        }
        parts[i] = square / size;"""),
    # adjoint of batch norm in train mode, from dy and the sums of dy and of dy y
    "norm_back": ("in dy, in x, in gamma, in mean, in var, in sums, out dx, real share", NORM + """
        real y = (x[i] - mean[c]) * inv;
        dx[i] = gamma[c] * inv * (dy[i] - (sums[c] + y * sums[C + c]) * share);"""),
    # Eq. (3), Eq. (8) and their gradient on the sums of y, y^2 and K tanhs from these sums
    "tap": ("in sums, in var, in pi, out losses, out dsums, real per, real w_bn, real w_tar, "
            "real share", """
        real m, v, gap, mean_norm = 0, var_norm = 0, loss = 0;
        for (int k = C; k >= 0; k--) {  // each channel, the last time that of the thread
            int c = k ? k - 1 : i;
            m = sums[c] * per, v = var[c] + real(1e-5);
            gap = (sums[C + c] * per - m * m) * v - var[c];
            mean_norm += k ? m * m * v : 0, var_norm += k ? gap * gap : 0;
        }
        mean_norm = sqrt(mean_norm), var_norm = sqrt(var_norm);
        dsums[C + i] = var_norm > 0 ? w_bn * gap / var_norm * v * per : 0;
        dsums[i] = (mean_norm > 0 ? w_bn * m / mean_norm * v * per : 0) - 2 * m * dsums[C + i];
        for (int k = 2; k < K + 2; k++) {
            real pi_k = pi[k - 2], scale = 1 / (pi_k * (1 - pi_k) * K * C), d;
            for (int c = 0; c < C; c++)
                d = real(.5) + sums[k * C + c] * per / 2 - pi_k, loss += d * d * scale;
            d = real(.5) + sums[k * C + i] * per / 2 - pi_k;
            dsums[k * C + i] = w_tar * share * d * scale * per;
        }
        losses[0] = w_bn != 0 ? mean_norm + var_norm : 0;  // the same from all threads
        losses[1] = loss * share;"""),
    # adds the adjoint of sums of y, y^2 and tanh(sign y / WIDTH - LEVEL), ..
    "tap_back": ("in x, in gamma, in mean, in var, in dsums, out dx", NORM + """
        real y = (x[i] - mean[c]) * inv, level[] = {LEVELS}, sum = dsums[c] + 2 * y * dsums[C + c];
        for (int k = 0; k < K; k++) {
            real soft = tanh(sign * y / real(WIDTH) - level[k]);
            sum += dsums[(2 + k) * C + c] * sign / real(WIDTH) * (1 - soft * soft);
        }
        dx[i] += sum * inv;"""),
    # all parameters at once: a row has the addresses of g, of what is updated, and the size
    "sgd": (TABLE + "real lr, real momentum, real weight_decay, real nesterov", EACH_ROW % """
            real *v = row[1], *p = row[2], d = g[i] + weight_decay * p[i];
            v[i] = momentum * v[i] + d;
            p[i] -= lr * (nesterov > 0 ? d + momentum * v[i] : v[i]);"""),
    "adam": (TABLE + "real lr, real eps, real rate, real rate2, real correct, real correct2",
             EACH_ROW % """
            real *m = row[1], *v = row[2], *p = row[3];
            m[i] += rate * (g[i] - m[i]);
            v[i] += rate2 * (g[i] * g[i] - v[i]);
            p[i] -= lr * (m[i] / correct) / (sqrt(v[i] / correct2) + eps);""")}
CUDA_SURROGATES = dict(sigmoid="1 - tanh(2 * x) * tanh(2 * x)",
                       triangle="x * x < 1 ? 1 - fabs(x) : 0",
                       atan=f"1 / (1 + real({np.pi ** 2}) * x * x)")

@functools.lru_cache(None)
def _compiled(name, dtype, constants):
    (arguments, body), real = KERNELS[name], "float" if dtype == np.float32 else "double"
    types = ("real", real), ("in", "const real* __restrict__"), ("out", "real* __restrict__")
    return xp.RawKernel("\n".join([DEVICE, *(f"#define {k} {v}" for k, v in (*constants, *types)),
                                   f'extern "C" __global__ void {name}(int n, {arguments}) {{',
                                   "int i = blockIdx.x * blockDim.x + threadIdx.x;",
                                   f"if (i >= n) return;{body} }}"]), name)

def launch(name, n, *arguments, dtype=None, **constants):
    """Run n threads of a kernel on arrays of one dtype, inputs taken as contiguous, and numbers."""
    dtype = dtype or arguments[0].dtype
    kernel = _compiled(name, dtype, (*constants.items(),))
    threads, values = constants.get("THREADS", 256), [np.int32(n)]
    for v in arguments:  # hundreds of times a step
        if isinstance(v, (int, float)):
            v = np.int32(v) if isinstance(v, int) else dtype.type(v)
        elif not v.flags.c_contiguous:
            v = xp.ascontiguousarray(v)
        values.append(v)
    kernel((-(-n // threads),), (threads,), tuple(values))

GPU_BLOCKS, GPU_THREADS = 1 << 10, 1 << 17  # to fill a GPU, where sums are made in parts

def gpu_address(v):
    """Where an array lies on the GPU."""
    return v.data.ptr

def tensor_cores():
    """Whether the GPU has those of "windows"; without them the formulas multiply matrices."""
    return int(xp.cuda.Device().compute_capability) >= 80

def _group(C):
    """How many of C channels lie together among the taps of "windows"."""
    return 16 if C % 16 == 0 else C

def _tiles(C, K, DW):
    """BN, M, X and THREADS of "windows", the fastest of those tried on an H100."""
    if DW and (C < 32 or C % 4):
        return min(64, K + -K % 16), 1, 1, 288
    if K <= 32:
        return 16 if K <= 16 else 32, 2, 1, 128
    if TF32:
        return (128, 4, 2, 128) if K > 64 else (64, 4 if DW else 2, 1, 128)
    if DW:
        return (128, 2, 2, 128) if K > 64 else (64, 2, 1, 128)
    return (128, 4, 4, 256) if K > 64 else (64, 4, 2, 256)

def gpu_windows(x, b, K, R, S, h, w, D=1, U=1, DW=0):
    """The kernel of that name: x (N, H, W, C), b -> (parts, rows, K)."""
    N, H, W, C = x.shape
    pixels, taps = N * h * w, R * S * C
    BN, M, X, threads = _tiles(C, K, DW)
    rows, tile = taps if DW else pixels, threads // X // 2 * M
    tiles = -(-rows // tile) * -(-K // BN)
    span = 16 * -(-(pixels if DW else taps) // (16 * max(1, DW * GPU_BLOCKS // tiles)))
    parts = -(-pixels // span) if DW else 1
    y = xp.empty((parts, rows, K), x.dtype)
    launch("windows", parts * tiles * threads, x, b, y, pixels, span, C=C, H=H, W=W, h=h, w=w, R=R,
           S=S, D=D, U=U, K=K, DW=DW, BN=BN, M=M, X=X, GROUP=_group(C), VA=1 if C % 4 else 4,
           VB=1 if K % 4 else 4, THREADS=threads, TF32=TF32)
    return y

def gpu_conv2d(x, w, stride=1, need="xp"):
    """conv2d, each of its three products a kernel that takes the windows from where they are: in
    TF32, or as three such products with the precision of float32."""
    (N, H, W, C), (K, _, R, S), (h, v) = x.shape, w.shape, (-(-n // stride) for n in x.shape[1:3])
    taps = xp.empty((1 + ("x" in need), w.size), x.dtype)
    launch("taps", taps.size, w, taps, C=C, K=K, R=R, S=S, SIZE=w.size, GROUP=_group(C),
           GROUP_K=_group(K), TF32=TF32)
    y = gpu_windows(x, taps[0], K, R, S, h, v, D=stride).reshape(N, h, v, K)
    kept = x if "p" in need else None
    def back(dy):
        dx = dw = None
        if "x" in need:
            dx = gpu_windows(dy, taps[1], C, R, S, H, W, U=stride).reshape(N, H, W, C)
        if "p" in need:
            dw = gpu_windows(kept, dy, K, R, S, h, v, D=stride, DW=1).sum(0)
            dw = dw.reshape(-1, R, S, _group(C), K).transpose(4, 0, 3, 1, 2)
            dw = xp.ascontiguousarray(dw.reshape(w.shape))
        return dx, dw
    return y, back

def gpu_sums(x, gamma, mean, var, *terms):
    """(terms, C): of each channel of x (.., C), sums of terms in e and y; two stages."""
    C, K = x.shape[-1], len(terms)
    parts = xp.empty((K, C, max(1, GPU_THREADS // C)), x.dtype)
    launch("sums", parts[0].size, x, gamma, mean, var, parts, x.size // C, C=C, K=K,
           TERMS=", ".join(terms))
    return parts.sum(2)

def gpu_tap(a, gamma, mean, var, pi, w_bn, w_tar, share, width, levels):
    """fast_tap; one kernel has the losses and their gradient on the sums."""
    C, K = a.shape[-1], len(levels)
    sums = gpu_sums(a, gamma, mean, var, "y", "y * y", *(
        f"tanh(sign * y / real({width}) - real({level}))" for level in levels))
    losses, dsums = xp.empty(2, a.dtype), xp.empty(sums.shape, a.dtype)
    launch("tap", C, sums, var, xp.asarray(pi, a.dtype), losses, dsums, C / a.size,
           float(w_bn), float(w_tar), float(share), C=C, K=K)
    def back(da):
        da = xp.ascontiguousarray(da)
        launch("tap_back", a.size, a, gamma, mean, var, dsums, da, C=C, K=K, WIDTH=width,
               LEVELS=", ".join(map(str, [*levels, 0])))
        return da
    return losses, back

def gpu_update(kernel, params, grads, state, moments, *numbers):
    """Whether a kernel has updated params and their state[moment + name], of each of moments."""
    if xp is np or not grads or not all(map(fast, grads.values())):
        return False
    table, kept = [], []
    for name, g in grads.items():
        state |= {m + name: xp.zeros(g.shape, g.dtype) for m in moments if m + name not in state}
        written = *(state[m + name] for m in moments), params[name]
        if not all(v.flags.c_contiguous for v in written):
            return False
        kept.append(xp.ascontiguousarray(g))
        table.append([*map(gpu_address, (kept[-1], *written)), g.size])
    launch(kernel, GPU_THREADS, xp.asarray(table), len(table), *map(float, numbers),
           dtype=kept[0].dtype, WIDTH=len(table[0]))
    return True

def gpu_norm_activation(a, gamma, beta, mean, var, activation, T, v_th, amplitude, first, shortcut,
                        train, need="p", momentum=.1):
    """fast_norm_activation, in few kernels. Keeps a and the shortcut."""
    a, C, count, running = xp.ascontiguousarray(a), a.shape[-1], a.size // a.shape[-1], (mean, var)
    if train:
        guess, new = a[0, a.shape[1] // 2, a.shape[2] // 2], xp.empty((4, C), a.dtype)
        launch("moments", C, gpu_sums(a, gamma, guess, var, "e", "e * e"), guess, mean, var, new,
               float(count), momentum)
        mean, var, *running = new
    n = activation if isinstance(activation, Neuron) else Neuron()
    z = xp.empty((len(a) * (T if first else 1), *a.shape[1:]), a.dtype)
    size = a.size if first else a.size // T
    numbers = [float(v) for v in (n.lam, n.v_init * v_th, v_th, amplitude)]
    given = a, gamma, beta, mean, var, a if shortcut is None else shortcut
    sizes = dict(C=C, T=T, FIRST=int(first), SHORTCUT=int(shortcut is not None),
                 HARD=int(n.reset == "hard"), SURROGATE=CUDA_SURROGATES[n.surrogate],
                 SLOPE=FAST_SLOPES.get(activation, -1.0))
    launch("fire", size, *given, z, *numbers, **sizes)
    def back(dz, each=None):
        da = xp.empty(a.shape, a.dtype)
        dy = xp.empty(a.shape, a.dtype) if train or shortcut is not None else da
        parts = xp.empty((2, C, max(1, GPU_THREADS // C)), a.dtype)
        launch("fire_back", parts[0].size, *given, dz, a if each is None else each, dy, da, parts,
               size, *numbers, **sizes, TRAIN=int(train), EACH=int(each is not None),
               DETACH=int(n.detach_reset))
        sums = parts.sum(2) if train or "p" in need else None
        if train:
            launch("norm_back", a.size, dy, a, gamma, mean, var, sums, da, 1 / count, C=C)
        dbeta, dgamma = sums if "p" in need else (None, None)
        return da, dgamma, dbeta, None if shortcut is None else dy
    return (z, tuple(running)), back

if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # ends as others do when nobody reads on
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    warnings.simplefilter("ignore", RuntimeWarning)  # each_epoch says what is not finite
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    sys.exit(main())
