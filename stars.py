#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy"]
# ///
"""STARS: data-free distillation of an ANN teacher into a spiking (SNN) student, one file of NumPy.

0  READING GUIDE.  A trained teacher knows its classes and, in its batch norms, the statistics of
data that is gone. A generator makes images from that knowledge, Eq. (9); a spiking student learns
the teacher's answers on them, Eq. (10). From the top down, a section uses what stands above it.

    1  arrays and devices    one code path for NumPy and CuPy
    2  operators             each returns its value and its adjoint
    3  spiking neuron        LIF and its surrogate gradient                    Eq. (1) (2)
    4  networks              ResNet, VGG, generator; energy                    Eq. (11)
    5  losses                synthesis and distillation                        Eq. (3) - (10)
    6  optimisers            SGD, Adam, cosine schedule
    8  weights and files     architectures, initial weights

The equations are numbered as in README.md; `# Eq. (n)` stands on the line that computes one.
Eq. (7) and (8) are this project's formalisation of the abstract of STARS (arXiv 2605.27409):
relational consistency and tail-aware regularisation are the paper's ideas, the formulas are ours.

Images and feature maps are NHWC, convolution weights (K, C, R, S), names of parameters those of a
PyTorch state_dict. T time steps are folded into the batch: (T, N, ...) -> (T*N, ...).
`value, back = operator(...)`: back takes the gradient of the value and returns the gradients of the
arguments, in their order; it changes nothing and is called at most once. `need` says which are
wanted, "x" for the input and "p" for the parameters; the others are None and cost nothing. dtype
follows the parameters. Wrong arguments raise ValueError with a sentence that names the argument.
"""
import dataclasses
import os
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

_ours = not {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & set(os.environ)
if _ours:  # section 12 works on chunks of images in parallel, so one BLAS thread for each chunk;
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # without effect where numpy was imported before
try:
    import numpy as np
except ImportError:
    raise SystemExit("stars.py needs numpy: pip install numpy") from None
if _ours:
    del os.environ["OPENBLAS_NUM_THREADS"]

# ---- 1  Arrays and devices -----------------------------------------------------------------------

xp = np  # the array module of every function below: numpy, or cupy after use_device("gpu")

def use_device(name="auto"):
    """Put arrays on the "cpu" (NumPy), the "gpu" (CuPy), or "auto": the GPU if a kernel runs there.

    Returns "cpu" or "gpu". Raises ValueError for another name, RuntimeError where there is no GPU.
    """
    global xp
    require(name in ("cpu", "gpu", "auto"), f"device must be cpu, gpu or auto, not {name!r}")
    xp = np
    if name != "cpu":
        try:
            import cupy
            if int((cupy.arange(3, dtype=cupy.float32) + 1).sum()) == 6:  # compiles and runs
                xp = cupy
        except Exception as error:  # not installed, no driver, no device, no compiler
            if name == "gpu":
                raise RuntimeError(f"no usable GPU ({type(error).__name__}: {error}): install the "
                                   "CuPy wheel of your CUDA version, or use the cpu") from None
    return "cpu" if xp is np else "gpu"

def to_host(x):
    """A NumPy array of x, which may live on the GPU."""
    return x.get() if hasattr(x, "get") else np.asarray(x)

def require(condition, sentence):
    """Raise ValueError(sentence) unless condition holds."""
    if not condition:
        raise ValueError(sentence)


# ---- 2  Operators: value and adjoint -------------------------------------------------------------

def conv2d(x, w, stride=1, need="xp"):
    """Same convolution, stride d.   y_n,i,j,k = sum_c,r,s x_n,i*d+r-R//2,j*d+s-S//2,c w_k,c,r,s

    x (N, H, W, C), w (K, C, R, S), R and S odd, stride 1 or 2 -> y (N, ceil(H/stride), .., K).
    back: dy -> dx, dw. Keeps x, w.
    """
    require(x.ndim == 4, f"conv2d: x must be (N, H, W, C), has shape {x.shape}")
    require(w.ndim == 4 and w.shape[1] == x.shape[3] and w.shape[2] % 2 and w.shape[3] % 2,
            f"conv2d: w must be (K, {x.shape[3]}, odd, odd), has shape {w.shape}")
    require(stride in (1, 2), f"conv2d: stride must be 1 or 2, not {stride!r}")
    (N, H, W, C), (K, _, R, S) = x.shape, w.shape
    P, Q = R // 2, S // 2
    padded = xp.pad(x, ((0, 0), (P, P), (Q, Q), (0, 0)))

    def window(a, r, s):  # the part of a padded array that w[:, :, r, s] multiplies
        return a[:, r:r + H:stride, s:s + W:stride]

    y = sum(window(padded, r, s) @ w[:, :, r, s].T for r, s in np.ndindex(R, S))

    def back(dy):
        dx = dw = None
        if "x" in need:
            dpadded = xp.zeros(padded.shape, x.dtype)
            for r, s in np.ndindex(R, S):
                window(dpadded, r, s)[...] += dy @ w[:, :, r, s]
            dx = dpadded[:, P:P + H, Q:Q + W]
        if "p" in need:
            dw = xp.empty(w.shape, w.dtype)
            for r, s in np.ndindex(R, S):
                dw[:, :, r, s] = dy.reshape(-1, K).T @ window(padded, r, s).reshape(-1, C)
        return dx, dw

    return y, back

def batch_norm(x, gamma, beta, mean, var, train=False, tap=None, need="xp", momentum=.1, eps=1e-5):
    """y = gamma (x - m) / sqrt(v + eps) + beta, over all axes but the last.   Ioffe & Szegedy 2015

    x (..., C); gamma, beta, mean, var (C,). m, v: mean, var (eval) or those of x (train, v biased).
    tap: x -> (loss, back), a loss on the input of the layer; its back() is added to dx.
    Value: (y, running, tapped). running: (mean, var), in train mode updated as PyTorch does, with
    the unbiased variance (returned, not written). tapped: the loss of the tap, or None.
    back: dy -> dx, dgamma, dbeta. Keeps the normalised x.
    """
    require(gamma.shape == x.shape[-1:],
            f"batch_norm: gamma must be ({x.shape[-1]},) like the channels of x, is {gamma.shape}")
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    tapped, tap_back = tap(x) if tap else (None, None)
    m, v, running = mean, var, (mean, var)
    if train:
        require(count > 1, "batch_norm: x has one value per channel, train mode needs more")
        m, v = x.mean(axes), x.var(axes)
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
            if tap:
                dx = dx + tap_back()
        return (dx, dgamma, dbeta) if "p" in need else (dx, None, None)

    return (normal * gamma + beta, running, tapped), back

def identity(x):
    """y = x.   back: dy -> dx."""
    return x, lambda dy: dy

def relu(x):
    """y = max(0, x), with gradient 0 at 0.   back: dy -> dx. Keeps the mask."""
    mask = x > 0
    return x * mask, lambda dy: dy * mask

def leaky_relu(x, slope=0.2):
    """y = x where x > 0, else slope x.   back: dy -> dx. Keeps the mask."""
    mask = x > 0
    return xp.where(mask, x, slope * x), lambda dy: xp.where(mask, dy, slope * dy)

def _logistic(x):
    return 0.5 * xp.tanh(0.5 * x) + 0.5  # 1 / (1 + exp(-x)) that cannot overflow

def sigmoid(x):
    """y = 1 / (1 + exp(-x)).   back: dy -> dx. Keeps y."""
    y = _logistic(x)
    return y, lambda dy: dy * y * (1 - y)

def linear(x, w, b, need="xp"):
    """y = x w' + b.   x (N, D), w (K, D), b (K,) -> y (N, K).   back: dy -> dx, dw, db."""
    require(x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1],
            f"linear: x and w must be (N, D) and (K, D), have shapes {x.shape} and {w.shape}")
    def back(dy):
        dx = dy @ w if "x" in need else None
        return (dx, dy.T @ x, dy.sum(0)) if "p" in need else (dx, None, None)
    return x @ w.T + b, back

def global_average_pool(x):
    """y_nc = mean_hw x_nhwc.   x (N, H, W, C) -> y (N, C).   back: dy -> dx."""
    N, H, W, C = x.shape
    return x.mean((1, 2)), lambda dy: xp.broadcast_to((dy / (H * W))[:, None, None], x.shape)

def _windows(x):
    """(N, H, W, C) -> (N, H/2, W/2, C, 4): the 2x2 windows, row by row."""
    N, H, W, C = x.shape
    require(H % 2 == W % 2 == 0, f"x must have even height and width to pool, has shape {x.shape}")
    x = x.reshape(N, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(N, H // 2, W // 2, C, 4)

def max_pool(x):
    """2x2 maximum, of equals the first takes dy.   x (N, H, W, C) -> y (N, H/2, W/2, C)."""
    windows = _windows(x)
    winner = windows.argmax(4)
    def back(dy):
        routed = dy[..., None] * (xp.arange(4) == winner[..., None])
        routed = routed.reshape(*dy.shape, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return routed.reshape(x.shape)
    return windows.max(4), back

def avg_pool(x):
    """2x2 mean.   x (N, H, W, C) -> y (N, H/2, W/2, C)."""
    return _windows(x).mean(4), lambda dy: upsample(dy / 4)[0]

def upsample(x):
    """Nearest-neighbour upsampling by 2.   x (N, H, W, C) -> y (N, 2H, 2W, C)."""
    return x.repeat(2, 1).repeat(2, 2), lambda dy: _windows(dy).sum(4)

def shortcut_a(x, channels):
    """Parameter-free shortcut: every second pixel, zero channels on both sides (He et al. 2016, A).

    x (N, H, W, C) -> y (N, ceil(H/2), ceil(W/2), channels).
    """
    C = x.shape[3]
    require(channels >= C, f"shortcut_a: channels must be at least {C} as in x, not {channels}")
    low = (channels - C) // 2
    def back(dy):
        dx = xp.zeros(x.shape, dy.dtype)
        dx[:, ::2, ::2] = dy[..., low:low + C]
        return dx
    return xp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (low, channels - C - low))), back

def log_softmax(x):
    """y = x - log sum_k exp x_k.   x (N, K).   back: dy -> dx. Keeps softmax x."""
    y = x - x.max(1, keepdims=True)
    y = y - xp.log(xp.exp(y).sum(1, keepdims=True))
    return y, lambda dy: dy - xp.exp(y) * dy.sum(1, keepdims=True)

def softmax(x):
    """y_k = exp x_k / sum_j exp x_j.   x (N, K).   back: dy -> dx. Keeps y."""
    y = xp.exp(log_softmax(x)[0])
    return y, lambda dy: y * (dy - (dy * y).sum(1, keepdims=True))

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
    require(x.shape[0] % T == 0, f"mean_over_time: {x.shape[0]} rows do not divide by T = {T}")
    return x.reshape((T, -1) + x.shape[1:]).mean(0), lambda dy: repeat_over_time(dy / T, T)[0]

def normalise(x, mean, std):
    """y = (x - mean) / std.   x (N, H, W, 3) in [0, 1]; mean, std: a number for each channel."""
    mean, std = xp.asarray(mean, x.dtype), xp.asarray(std, x.dtype)
    return (x - mean) / std, lambda dy: dy / std

def augment(x, offsets, flips, pad=4):
    """Crop out of a zero-padded image, then mirror left-right.   x (N, H, W, C) -> y as x.

    offsets (N, 2): row and column of the crop, integers in 0 .. 2 pad; flips (N,): booleans.
    """
    N, H, W, C = x.shape
    offsets, flips = xp.asarray(offsets), xp.asarray(flips)
    require(offsets.shape == (N, 2) and flips.shape == (N,),
            f"offsets and flips must be ({N}, 2) and ({N},), are {offsets.shape} and {flips.shape}")
    rows = offsets[:, :1] + xp.arange(H)
    columns = offsets[:, 1:] + xp.where(flips[:, None], xp.arange(W)[::-1], xp.arange(W))
    index = xp.arange(N)[:, None, None], rows[:, :, None], columns[:, None]
    padded = xp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    def back(dy):
        dpadded = xp.zeros(padded.shape, dy.dtype)
        dpadded[index] = dy
        return dpadded[:, pad:pad + H, pad:pad + W]
    return padded[index], back

def draw_augmentation(rng, n, pad=4):
    """Random (offsets, flips) for n images, from a numpy Generator."""
    return rng.integers(0, 2 * pad + 1, (n, 2)), rng.random(n) < 0.5


# ---- 3  Spiking neuron ---------------------------------------------------------------------------

SURROGATES = {  # name: (primitive G, derivative g' = dG/dx) of x = (u - V)/V, Eq. (2)
    "sigmoid": (lambda x: _logistic(4 * x), lambda x: 1 - xp.tanh(2 * x) ** 2),
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
        require(self.surrogate in SURROGATES,
                f"surrogate must be one of {', '.join(SURROGATES)}, not {self.surrogate!r}")

def lif(current, T, v_th=1.0, amplitude=1.0, neuron=Neuron(), spike=None):
    """Leaky integrate-and-fire over T steps: Eq. (1) forward, Eq. (2) backward through time.

    current (T*N, ...) -> z (T*N, ...) of values 0 and amplitude. v_th > 0, amplitude: numbers.
    spike: x = (u - V)/V -> s, called once a step: the Heaviside step unless a check replaces it.
    back: dz -> dcurrent. Keeps the membrane before reset and the spikes.
    """
    require(T >= 1 and len(current) % T == 0, f"lif: {len(current)} rows do not divide by T = {T}")
    lam, V, A, hard = neuron.lam, float(v_th), float(amplitude), neuron.reset == "hard"
    require(V > 0, f"lif: v_th must be positive, not {V}")
    spike = spike or (lambda x: (x >= 0).astype(x.dtype))
    slope = SURROGATES[neuron.surrogate][1]
    drive = current.reshape((T, -1) + current.shape[1:])
    membrane, spikes = xp.empty_like(drive), xp.empty_like(drive)
    u, s = xp.full(drive.shape[1:], neuron.v_init * V, drive.dtype), 0.0
    for t in range(T):
        u = lam * (u * (1 - s) if hard else u - V * s) + drive[t]  # Eq. (1)
        s = spike((u - V) / V)
        membrane[t], spikes[t] = u, s

    def back(dz):
        dz, dcurrent = dz.reshape(drive.shape), xp.empty_like(drive)
        dkept = 0.0  # gradient of what step t + 1 receives of the membrane after reset, times lam
        for t in reversed(range(T)):
            u, s = membrane[t], spikes[t]
            ds = A * dz[t]
            if not neuron.detach_reset:
                ds = ds - dkept * (u if hard else V)
            du = ds * slope((u - V) / V) / V  # Eq. (2)
            du = du + (dkept * (1 - s) if hard else dkept)
            dcurrent[t] = du
            dkept = lam * du
        return dcurrent.reshape(current.shape)

    return A * spikes.reshape(current.shape), back


# ---- 4  Networks ---------------------------------------------------------------------------------

class Net(NamedTuple):
    """A teacher (activation relu, T = 1) or a student (activation a Neuron) and how to run it."""
    params: dict                             # name -> array; optional <layer>.v_th, .amplitude
    activation: Any = relu                   # a Neuron, or a function x -> (y, back)
    T: int = 1                               # time steps
    mean: tuple = (0.4914, 0.4822, 0.4465)   # normalisation of images in [0, 1], per channel
    std: tuple = (0.2023, 0.1994, 0.2010)

class Output(NamedTuple):
    """What a network gives, and what it met on the way."""
    logits: Any      # (N, K), averaged over time
    features: Any    # (N, D), the pooled input of the last linear layer, averaged over time
    running: dict    # train: the next running statistics, by parameter name
    tapped: dict     # layer -> what the tap on its input returned
    rates: dict      # measure: layer -> share of neurons and steps that spike
    costs: list      # measure: (layer, MACs an image, accumulates an image and step, or None)

def norm_activation(a, gamma, beta, mean, var, activation=relu, T=1, v_th=1.0, amplitude=1.0,
                    first=False, shortcut=None, train=False, tap=None, need="xp"):
    """z = activation(batch_norm(a) + shortcut).   first: a is (N, ...) and drives all T steps.

    Value: (z, running, tapped) as in batch_norm.   back: dz -> da, dgamma, dbeta, dshortcut.
    """
    (y, running, tapped), norm_back = batch_norm(a, gamma, beta, mean, var, train, tap, need)
    y, time_back = repeat_over_time(y, T) if first and T > 1 else identity(y)
    if shortcut is not None:
        y = y + shortcut
    if isinstance(activation, Neuron):
        z, activation_back = lif(y, T, v_th, amplitude, activation)
    else:
        z, activation_back = activation(y)
    def back(dz):
        dy = activation_back(dz)
        return (*norm_back(time_back(dy)), dy if shortcut is not None else None)
    return (z, running, tapped), back

def _accumulates(x, macs):
    """Share of macs that spikes x cause, or None where x is not spikes: two values other than 0."""
    return macs * float((x != 0).mean()) if bool(((x == 0) | (x == abs(x).max())).all()) else None

def _layer(run, conv, norm, x, stride=1, first=False, shortcut=None, activation=None):
    """activation(batch_norm(conv2d(x)) + shortcut), by names.   back: dz -> dx, dshortcut."""
    p, out, activation = run.params, run.out, activation or run.activation
    inner = run.need and "x" + run.need  # the gradient passes through every layer but the first
    w = p[conv + ".weight"]
    a, conv_back = conv2d(x, w, stride, run.need if first else inner)
    (z, running, tapped), norm_back = norm_activation(
        a, *(p[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")),
        activation, run.T, p.get(norm + ".v_th", 1.0), p.get(norm + ".amplitude", 1.0), first,
        shortcut, run.train, run.tap and (lambda a: run.tap(norm, a)), inner)
    if run.train:
        out.running[norm + ".running_mean"], out.running[norm + ".running_var"] = running
    if run.tap:
        out.tapped[norm] = tapped
    if run.measure:
        macs = a[0, ..., 0].size * w.size
        out.costs.append((conv, macs, _accumulates(x, macs)))
        if isinstance(activation, Neuron):
            out.rates[norm] = float((z != 0).mean())
    def back(dz):
        da, dgamma, dbeta, dshortcut = norm_back(dz)
        dx, dw = conv_back(da)
        if "p" in run.need:
            run.grads |= {conv + ".weight": dw, norm + ".weight": dgamma, norm + ".bias": dbeta}
        return dx, dshortcut
    return z, back

def _residual_block(run, name, x, stride):
    """activation(bn2(conv2(z)) + shortcut(x)), z = activation(bn1(conv1(x))).   back: dy -> dx."""
    channels = run.params[name + ".conv2.weight"].shape[0]
    z, back1 = _layer(run, name + ".conv1", name + ".bn1", x, stride)
    if name + ".shortcut.0.weight" in run.params:
        kept, projection_back = _layer(run, name + ".shortcut.0", name + ".shortcut.1", x, stride,
                                       activation=identity)
        shortcut_back = lambda dy: projection_back(dy)[0]
    else:
        same = stride == 1 and x.shape[3] == channels
        kept, shortcut_back = identity(x) if same else shortcut_a(x, channels)
        if run.measure:  # no multiplication, and one accumulate for each spike that is added
            run.out.costs.append((name + ".shortcut", 0, _accumulates(kept, kept[0].size)))
    y, back2 = _layer(run, name + ".conv2", name + ".bn2", z, 1, shortcut=kept)
    def back(dy):
        dz, dkept = back2(dy)
        return back1(dz)[0] + shortcut_back(dkept)
    return y, back

def _network(body, last, params, activation, T, train=False, tap=None, need="xp", measure=False):
    """What resnet and vgg share: body(run, backs) makes the last maps; here they are classified."""
    run = SimpleNamespace(params=params, activation=activation, T=T, train=train, tap=tap, grads={},
                          need=need, measure=measure, out=Output(None, None, {}, {}, {}, []))
    backs = []
    pooled, pool_back = global_average_pool(body(run, backs))
    features, time_back = mean_over_time(pooled, T)
    w, b = params[last + ".weight"], params[last + ".bias"]
    logits, linear_back = linear(features, w, b, need and "x" + need)
    if measure:
        run.out.costs.append((last, w.size, _accumulates(features, w.size)))
    def back(dlogits, dfeatures=None):
        dx, dw, db = linear_back(dlogits)
        if "p" in need:
            run.grads |= {last + ".weight": dw, last + ".bias": db}
        dx = pool_back(time_back(dx if dfeatures is None else dx + dfeatures))
        while backs:  # what a layer kept is freed as soon as its gradient is known
            dx = backs.pop()(dx)
        return dx, run.grads
    return run.out._replace(logits=logits, features=features), back

def resnet(params, x, activation=relu, T=1, **mode):
    """A ResNet of basic blocks (He et al. 2016), its shape read off the names in params.

    x (N, H, W, 3), normalised. activation: relu, a Neuron (T steps, each driven by the image
    through the first convolution) or a function x -> (y, back). mode: train; need; tap(layer, a),
    a loss on the input a of a batch norm, see there; measure, to fill rates and costs.
    Value: Output.   back: dlogits (N, K), dfeatures (N, D) or None -> dx, {name: gradient}.
    """
    def body(run, backs):
        z, back = _layer(run, "conv1", "bn1", x, first=True)
        backs.append(lambda dz: back(dz)[0])
        for block in sorted(set(re.findall(r"(layer\d+\.\d+)\.", " ".join(params))), key=_depth):
            stride = 2 if block[5] > "1" and block.endswith(".0") else 1
            z, back_block = _residual_block(run, block, z, stride)
            backs.append(back_block)
        return z
    return _network(body, "linear", params, activation, T, **mode)

def vgg(params, x, activation=relu, T=1, pool=max_pool, **mode):
    """A VGG as torchvision numbers it: conv features.N, norm N+1, activation N+2, perhaps pool N+3.

    x (N, H, W, 3), H and W multiples of 32; the rest as resnet.
    """
    def body(run, backs):
        convs = sorted(int(k[9:-7]) for k, w in params.items() if w.ndim == 4)
        z = x
        for n, following in zip(convs, convs[1:] + [0]):
            z, back = _layer(run, f"features.{n}", f"features.{n + 1}", z, first=n == 0)
            backs.append(lambda dz, back=back: back(dz)[0])
            if following != n + 3:
                z, back = pool(z)
                backs.append(back)
        return z
    return _network(body, "classifier", params, activation, T, **mode)

def forward(net, x, **mode):
    """Run a Net on normalised images x (N, H, W, 3); mode, value and back as resnet."""
    family = vgg if "classifier.weight" in net.params else resnet
    return family(net.params, x, net.activation, net.T, **mode)

def generator(params, z, labels=None, need="p", activation=leaky_relu):
    """Images from latents: linear, twice (upsample, convolve), convolve, sigmoid.

    z (N, Z); labels (N,): integers, where fc has Z + classes columns. Batch norms in train mode.
    Value: images (N, S, S, 3) in [0, 1].   back: dimages -> dz, {name: gradient}.
    """
    grads, backs, inner = {}, [], "x" + need
    if labels is not None:
        one_hot = xp.eye(params["fc.weight"].shape[1] - z.shape[1], dtype=z.dtype)
        z = xp.concatenate([z, one_hot[xp.asarray(labels)]], 1)

    def add(value, back, *names):  # an operator, and the names of its parameters
        def through(dy):
            dx = back(dy)
            if names:
                grads.update(zip(names, dx[1:]))
            return dx[0] if isinstance(dx, tuple) else dx
        backs.append(through)
        return value

    def norm(a, name, activation):
        gamma, beta = params[name + ".weight"], params[name + ".bias"]
        (y, _, _), back = norm_activation(a, gamma, beta, 0, 1, activation, train=True, need=inner)
        return add(y, back, name + ".weight", name + ".bias")

    fc, fc_back = linear(z, params["fc.weight"], params["fc.bias"], inner)
    channels = params["bn0.weight"].size
    side = round((fc.shape[1] / channels) ** 0.5)
    add(fc, fc_back, "fc.weight", "fc.bias")
    y = add(fc.reshape(-1, channels, side, side).transpose(0, 2, 3, 1),
            lambda dy: dy.transpose(0, 3, 1, 2).reshape(fc.shape))
    y = norm(y, "bn0", identity)
    for i in "12":
        y = add(*upsample(y))
        y = add(*conv2d(y, params[f"conv{i}.weight"], 1, inner), f"conv{i}.weight")
        y = norm(y, "bn" + i, activation)
    y = add(*conv2d(y, params["conv3.weight"], 1, inner), "conv3.weight")
    images = add(*sigmoid(y + params["conv3.bias"]))
    def back(dimages):
        dy = backs.pop()(dimages)
        grads["conv3.bias"] = dy.sum((0, 1, 2))
        while backs:
            dy = backs.pop()(dy)
        return dy, {k: g for k, g in grads.items() if g is not None}
    return images, back

def _depth(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

def batch_norms(params):
    """The names of the batch norms with running statistics, from the input to the output."""
    return sorted((k[:-13] for k in params if k.endswith(".running_mean")), key=_depth)

E_MAC, E_AC = 4.6e-12, 0.9e-12  # joules a float32 multiply-add, add: 45 nm (Horowitz 2014)

def energy(costs, T):
    """Joules per image, (spiking, ANN), from the costs of the Output of a student with T steps.

    Batch norms folded into the convolutions, padding counted, updates of the neurons left out.
    """
    spiking = sum(E_MAC * macs if accumulates is None else E_AC * accumulates * T
                  for _, macs, accumulates in costs)  # Eq. (11)
    return spiking, E_MAC * sum(macs for _, macs, _ in costs)


# ---- 5  Losses: (loss, back), back(dloss=1) -> the gradients of the arguments that carry one -----

def bn_matching(a, mean, var):
    """|mu(a) - mean|_2 + |var(a) - var|_2, a layer of Eq. (3).  a (..., C).   back: dloss -> da."""
    axes, count = tuple(range(a.ndim - 1)), a.size // a.shape[-1]
    m = a.mean(axes)
    gap_mean, gap_var = m - mean, a.var(axes) - var
    norm_mean, norm_var = xp.sqrt((gap_mean ** 2).sum()), xp.sqrt((gap_var ** 2).sum())
    def back(dloss=1.0):
        dm = gap_mean / xp.where(norm_mean > 0, norm_mean, 1)  # the gradient of a norm at 0 is 0
        dv = gap_var / xp.where(norm_var > 0, norm_var, 1)
        return (dm + 2 * (a - m) * dv) * (dloss / count)
    return norm_mean + norm_var, back  # Eq. (3)

def class_prior(t, labels=None):
    """mean_b CE(t, y), y constant: labels (B,) or argmax t.   t (B, K).   back: dloss -> dt."""
    y = t.argmax(1) if labels is None else xp.asarray(labels)
    require(y.shape == t.shape[:1], f"labels must be ({len(t)},) as the rows of t, are {y.shape}")
    log_p, log_back = log_softmax(t)
    one_hot = (xp.arange(t.shape[1]) == y[:, None]).astype(t.dtype)
    def back(dloss=1.0):
        return log_back(-one_hot * (dloss / len(t)))
    return -(one_hot * log_p).sum() / len(t), back  # Eq. (4)

def balance(t):
    """sum_c p_c log p_c, p = mean_b softmax t (B, K).   back: dloss -> dt."""
    q, softmax_back = softmax(t)
    p = q.mean(0)
    log_p = xp.log(xp.maximum(p, xp.finfo(p.dtype).tiny))
    def back(dloss=1.0):
        return softmax_back(xp.broadcast_to((log_p + 1) * (dloss / len(t)), t.shape))
    return (p * log_p).sum(), back  # Eq. (5)

def adversarial(t, s):
    """-mean_b [argmax t = argmax s] KL(softmax t || softmax s), [..] constant, the mean over all B.

    t, s (B, K).   back: dloss -> dt, ds.
    """
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

    f_t (B, D), f_s (B, D'), B >= 2.   back: dloss -> df_t, df_s.   Ours, after arXiv 2605.27409.
    """
    B = len(f_t)
    require(B >= 2 and len(f_s) == B, "rca: f_t and f_s must have the same number of rows, 2 or "
                                      f"more, have shapes {f_t.shape} and {f_s.shape}")
    (c_t, back_t), (c_s, back_s) = cosine_matrix(f_t), cosine_matrix(f_s)
    gap = (c_t - c_s) * (1 - xp.eye(B, dtype=f_t.dtype))
    def back(dloss=1.0):
        dgap = gap * (2 * dloss / (B * (B - 1)))
        return back_t(dgap), back_s(-dgap)
    return (gap ** 2).sum() / (B * (B - 1)), back  # Eq. (7)

def _normal(x):
    return np.exp(-0.5 * x ** 2)

def _mixture(x, classes, shift):
    """A normal law, one part in classes of it shifted up; mean 0, variance 1."""
    p = 1 / classes
    sd = (1 + p * (1 - p) * shift ** 2) ** 0.5
    return (1 - p) * _normal(x * sd + p * shift) + p * _normal(x * sd - (1 - p) * shift)

TAIL_LAWS = {  # density up to a factor, mean 0, variance 1
    "normal": lambda x, classes, shift: _normal(x),
    "laplace": lambda x, classes, shift: np.exp(-2 ** 0.5 * abs(x)),
    "logistic": lambda x, classes, shift: np.cosh(np.pi * x / 12 ** 0.5) ** -2.0,
    "mixture": _mixture, "deep_mixture": _mixture}

@dataclasses.dataclass(frozen=True)
class Tail:
    """The targets of Eq. (8)."""
    law: str = "normal"          # a key of TAIL_LAWS, or a number for each kappa: "0.17,0.04,0.01"
    kappa: tuple = (1, 2, 3)     # thresholds, in standard deviations above the mean
    tau: float = 0.25            # softness of the exceedance, in the same unit
    side: str = "two-sided"      # or "at-least": exceedance above the target is not penalised
    shift: float = 3.0           # mixture: of the one class in K, in deviations of a class;
                                 # deep_mixture: in the last layer, growing from 0 in the first

    def __post_init__(self):
        require(self.side in ("two-sided", "at-least"),
                f"side must be two-sided or at-least, not {self.side!r}")
        require(self.tau > 0, f"tau must be positive, not {self.tau}")
        self.targets(1, 10)

    def targets(self, layers, classes):
        """pi (layers, kappas) = E sigmoid((xi - kappa)/tau), layers from input to output."""
        if self.law not in TAIL_LAWS:
            numbers = self.law.split(",")
            require(all(re.fullmatch(r"\s*0?\.\d*[1-9]\d*\s*", n) for n in numbers)
                    and len(numbers) == len(self.kappa), f"law must be {', '.join(TAIL_LAWS)}, or "
                    f"{len(self.kappa)} numbers between 0 and 1, not {self.law!r}")
            return np.tile([float(n) for n in numbers], (layers, 1))
        xi = np.linspace(-40, 40, 80001)
        soft = 0.5 + 0.5 * np.tanh((xi - np.array(self.kappa)[:, None]) / (2 * self.tau))
        depth = np.linspace(0, 1, layers) if self.law == "deep_mixture" else np.ones(layers)
        density = np.array([TAIL_LAWS[self.law](xi, classes, self.shift * d) for d in depth])
        return density @ soft.T / density.sum(1, keepdims=True)

def tar(a, gamma, mean, var, pi, kappa=(1, 2, 3), tau=0.25, side="two-sided", eps=1e-5):
    """Tail-aware regularisation of a layer: mean_ck d(e_ck, pi_k)^2 / (pi_k (1 - pi_k)).

    a (..., C): input of a batch norm of the teacher with weight gamma, running mean and var, (C,).
    e_ck: mean soft exceedance of kappa_k by h, the normalised a, positive towards firing; h = 0
    where gamma = 0. d = e - pi; side "at-least": max(0, pi - e).   pi: a number for each kappa.
    back: dloss -> da.   Ours, after arXiv 2605.27409.
    """
    require(len(pi) == len(kappa), f"tar: pi must have {len(kappa)} entries, has {len(pi)}")
    axes, count = tuple(range(a.ndim - 1)), a.size // a.shape[-1]
    slope = xp.sign(gamma) / xp.sqrt(var + eps)
    h = (a - mean) * slope
    loss, terms = 0.0, []
    for k, target in zip(kappa, map(float, pi)):
        soft = _logistic((h - k) / tau)
        d = soft.mean(axes) - target
        d = xp.minimum(d, 0) if side == "at-least" else d
        scale = 1 / (target * (1 - target) * d.size * len(kappa))
        loss = loss + (d ** 2).sum() * scale  # Eq. (8)
        terms.append((soft, 2 * d * scale))
    def back(dloss=1.0):
        dh = sum(soft * (1 - soft) * d for soft, d in terms)
        return dh * (slope * (dloss / (tau * count)))
    return loss, back

@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of Eq. (9); 0 drops a term and its cost. During warm-up adv = rca = 0."""
    bn: float = 1.0      # Eq. (3)
    oh: float = 1.0      # Eq. (4)
    bal: float = 5.0     # Eq. (5)
    adv: float = 1.0     # Eq. (6)
    rca: float = 10.0    # Eq. (7)
    tar: float = 100.0   # Eq. (8)

def synthesis_loss(x, teacher, student=None, weights=Weights(), labels=None, tail=Tail()):
    """How good images are for distillation, and the gradient on them: for any source of images.

    x (B, H, W, 3) in [0, 1], not normalised. teacher, student: Net, both run in eval mode; student
    may be None where weights.adv = weights.rca = 0. labels: see class_prior. Returns (parts,
    dtotal/dx): parts has the loss of each field of Weights, not weighted, and "total".
    """
    require(x.ndim == 4 and x.shape[3] == 3, f"x must be (B, H, W, 3), has shape {x.shape}")
    require(student is not None or not (weights.adv or weights.rca),
            "weights.adv and weights.rca must be 0 where student is None")
    p, layers = teacher.params, batch_norms(teacher.params)
    classes = len(p["linear.bias" if "linear.bias" in p else "classifier.bias"])
    targets = dict(zip(layers, tail.targets(len(layers), classes)))
    channels = sum(p[layer + ".weight"].size for layer in layers)
    parts = dict.fromkeys(("bn", "oh", "bal", "adv", "rca", "tar"), 0.0)

    def tap(layer, a):
        gamma, mean, var = (p[f"{layer}.{v}"] for v in ("weight", "running_mean", "running_var"))
        share = gamma.size / channels  # Eq. (8) is a mean over the channels of all layers
        backs = []
        if weights.bn:
            loss, back = bn_matching(a, mean, var)
            parts["bn"] = parts["bn"] + loss
            backs.append((back, weights.bn))
        if weights.tar:
            loss, back = tar(a, gamma, mean, var, targets[layer], tail.kappa, tail.tau, tail.side)
            parts["tar"] = parts["tar"] + loss * share
            backs.append((back, weights.tar * share))
        return None, lambda: sum(back(weight) for back, weight in backs)

    normal, normal_back = normalise(x, teacher.mean, teacher.std)
    t, t_back = forward(teacher, normal, tap=tap, need="x")
    parts["oh"], oh_back = class_prior(t.logits, labels)
    parts["bal"], bal_back = balance(t.logits)
    dt, dt_features, dx = oh_back(weights.oh) + bal_back(weights.bal), None, 0
    if weights.adv or weights.rca:
        s, s_back = forward(student, normal, need="x")
        parts["adv"], adv_back = adversarial(t.logits, s.logits)
        dt_adv, ds = adv_back(weights.adv)
        parts["rca"], rca_back = rca(t.features, s.features)
        dt_features, ds_features = rca_back(weights.rca)
        dt, dx = dt + dt_adv, s_back(ds, ds_features)[0]
    dx = dx + t_back(dt, dt_features)[0]
    parts["total"] = sum(getattr(weights, k) * loss for k, loss in parts.items())  # Eq. (9)
    return parts, normal_back(dx)

def distillation_loss(t, s, tau=4.0):
    """tau^2 mean_b KL(softmax(t/tau) || softmax(s/tau)), t constant (B, K).   back: dloss -> ds."""
    require(t.shape == s.shape, f"t and s must have the same shape, have {t.shape} and {s.shape}")
    log_t, log_s = log_softmax(t / tau)[0], log_softmax(s / tau)[0]
    p_t = xp.exp(log_t)
    def back(dloss=1.0):
        return (xp.exp(log_s) - p_t) * (dloss * tau / len(t))
    return tau ** 2 * (p_t * (log_t - log_s)).sum() / len(t), back  # Eq. (10)


# ---- 6  Optimisers: update params and state in place, for every name in grads --------------------

def sgd(params, grads, state, lr, momentum=0.9, nesterov=False, weight_decay=0.0):
    """g += weight_decay p;   v = momentum v + g;   p -= lr (g + momentum v if nesterov else v)."""
    for name, g in grads.items():
        g = g + weight_decay * params[name]
        v = state[name] = momentum * state[name] + g if name in state else g
        params[name] -= lr * (g + momentum * v if nesterov else v)

def adam(params, grads, state, lr, betas=(0.9, 0.999), eps=1e-8):
    """p -= lr m / (sqrt v + eps); m, v: bias-corrected means of g and g^2 (Kingma & Ba 2015)."""
    step = state["step"] = state.get("step", 0) + 1
    for name, g in grads.items():
        m, v = state.get("m." + name, 0), state.get("v." + name, 0)
        m, v = m + (1 - betas[0]) * (g - m), v + (1 - betas[1]) * (g * g - v)
        state["m." + name], state["v." + name] = m, v
        m, v = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        params[name] -= lr * m / (xp.sqrt(v) + eps)

def cosine(step, steps, lr, warm_up=0):
    """Learning rate at a step: linear up to lr over warm_up steps, then half a cosine to 0."""
    if step < warm_up:
        return lr * (step + 1) / warm_up
    return 0.5 * lr * (1 + float(np.cos(np.pi * (step - warm_up) / max(1, steps - warm_up))))


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
    shapes, c = {}, 3

    def add(conv, norm, k, c, size=3):
        shapes[conv + ".weight"] = (k, c, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (k,)
        return k

    if arch.startswith("vgg"):
        n, last = 0, "classifier"
        for stage, convs in enumerate(stages):
            for _ in range(convs):
                c = add(f"features.{n}", f"features.{n + 1}", width * min(2 ** stage, 8), c)
                n += 3
            n += 1  # the pool
    else:
        c, last = add("conv1", "bn1", width, c), "linear"
        for stage, blocks in enumerate(stages):
            for name in (f"layer{stage + 1}.{i}" for i in range(blocks)):
                k = add(name + ".conv1", name + ".bn1", width * 2 ** stage, c)
                add(name + ".conv2", name + ".bn2", k, k)
                if c != k and projection:
                    add(name + ".shortcut.0", name + ".shortcut.1", k, c, 1)
                c = k
    return shapes | {last + ".weight": (classes, c), last + ".bias": (classes,)}

def generator_shapes(size=32, width=128, z_dim=256, classes=0):
    """{name: shape} of the generator of size x size images; classes > 0: class-conditional.

    The layout that CMI, Fast-Datafree and NAYER use, with width 128.
    """
    require(size % 4 == 0, f"size must be a multiple of 4, not {size}")
    rows, half = width * (size // 4) ** 2, width // 2
    norms = {f"bn{i}.{part}": (k,) for i, k in enumerate((width, width, half))
             for part in ("weight", "bias")}
    return {"fc.weight": (rows, z_dim + classes), "fc.bias": (rows,), **norms,
            "conv1.weight": (width, width, 3, 3), "conv2.weight": (half, width, 3, 3),
            "conv3.weight": (3, half, 3, 3), "conv3.bias": (3,)}

def init_weights(shapes, rng, dtype=np.float32):
    """Initial weights, drawn on the host in the order of shapes {name: shape}.

    Convolutions of a teacher or student: He normal; linear layers and the generator: uniform within
    1/sqrt(fan in), as PyTorch; batch norms: 1 and 0.
    """
    def draw(name, shape):
        fan_in = np.prod(shapes.get(name.replace("bias", "weight"), shape)[1:])
        if len(shape) == 1 and fan_in == 1:  # a vector of a batch norm
            return np.full(shape, float(name.endswith(("weight", "var"))))
        if len(shape) == 4 and "fc.weight" not in shapes:
            return rng.normal(0, (2 / fan_in) ** 0.5, shape)
        return rng.uniform(-fan_in ** -0.5, fan_in ** -0.5, shape)
    return {name: xp.asarray(draw(name, shape).astype(dtype)) for name, shape in shapes.items()}
