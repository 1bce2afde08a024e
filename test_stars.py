"""Tests of stars.py: gradients against finite differences, equations against their definitions.

A check is a function of a module, `check(S, ...)`. `make test` runs it on stars, with arguments
drawn by hypothesis, and on mutants of stars, which it must fail. All in float64 on the CPU.

    1  finite differences, and the tests of the tester
    2  operators           5  losses            8  mutants
    3  spiking neuron      6  optimisers        9  fast paths, GPU parity
    4  networks            7  arguments, devices   10 - 12  data, files, command line; PyTorch peer;
                                                      the benchmark and the ablation
"""
import argparse
import ast
import collections
import contextlib
import copy
import ctypes
import functools
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import timeit
import tracemalloc
import types
import zipfile
import zlib
from pathlib import Path

import stars  # before numpy: it sets the threads of BLAS
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

settings.register_profile("stars", max_examples=12, deadline=None, derandomize="CI" in os.environ)
settings.load_profile("stars")
SOURCE = Path(stars.__file__).read_text()
CHECKS = {}  # name -> check(S): what a mutant has to pass to survive
CLOSING = []  # lines of the closing output
TORTURE = "STARS_TORTURE" in os.environ

def checks(name="", **draws):
    """Make check(S, ...) a test of stars, its arguments drawn, and of mutants, by its defaults."""
    def register(check):
        check.__name__ = name.replace(" ", "_") or check.__name__
        def test(**drawn):
            check(stars, **drawn)
        test = given(**draws)(test) if draws else lambda: check(stars)
        test.__name__ = test.__qualname__ = "test_" + check.__name__
        globals()[test.__name__], CHECKS[check.__name__] = test, check
        return check
    return register

SEED = st.integers(0, 2 ** 32 - 1)
FEW, SIDE, ODD = st.integers(1, 4), st.integers(1, 7), st.sampled_from((1, 3, 5))

@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Where there is a GPU, only the tests that ask for it see it."""
    if "gpu" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "cupy", None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    yield
    stars.use_device("cpu")

@pytest.fixture(scope="session", autouse=True)
def closing(request):
    class Closing:
        def pytest_terminal_summary(self, terminalreporter):
            for line in CLOSING:
                terminalreporter.write_line(line)
    request.config.pluginmanager.register(Closing())

# ---- 1  Finite differences -----------------------------------------------------------------------

def fixed(a):
    """A copy that nothing can write to."""
    a = np.array(a)
    a.setflags(write=False)
    return a

def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    arrays = [fixed(rng.normal(size=shape)) for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]

def away_from_zero(x):
    return fixed(np.sign(x) * (0.1 + abs(x)))

def distinct(seed, *shape):
    size = math.prod(shape)
    return fixed(np.random.default_rng(seed).permutation(size).reshape(shape) / size - 0.4)

def unit(a):
    return a / (np.sqrt((a * a).sum()) or 1)

def gradient_errors(f, args, h=1e-5):
    """Relative errors of back along one direction for each argument, and along a joint one.

    f(*args) -> value, back. The loss is a random projection of the value; its derivatives are
    central differences of fourth order. A direction is random, but tilted towards the gradient:
    no derivative is small by accident, so an error is relative to the derivative, nothing else.
    """
    rng = np.random.default_rng(271828)  # no seed of the arguments
    args = [fixed(a) for a in args]
    value, back = f(*args)
    projection = fixed(rng.normal(size=np.shape(value)))
    grads = back(projection)
    grads = grads if isinstance(grads, (tuple, list)) else (grads,)
    assert [g.shape for g in grads] == [a.shape for a in args]
    directions = []
    for g in grads:
        d = unit(rng.normal(size=g.shape))
        directions.append(unit(unit(g) + (d if (d * g).sum() >= 0 else -d)))

    def error(directions):
        analytic = sum((g * d).sum() for g, d in zip(grads, directions))
        step = h * np.clip(max(abs(analytic), 1e-9) ** -0.5, 0.1, 3)  # short where it is steep
        at = {i: f(*(a + i * step * d for a, d in zip(args, directions)))[0]
              for i in (-2, -1, 1, 2)}
        numeric = ((8 * (at[1] - at[-1]) - (at[2] - at[-2])) * projection).sum() / (12 * step)
        return abs(analytic - numeric) / max(abs(analytic), abs(numeric))

    with np.errstate(invalid="ignore"):  # 0 / 0: an argument without any effect is an error
        return [error([d * (i == j) for j, d in enumerate(directions)]) for i in range(len(args))
                ] + [error(directions)]

def assert_gradient(f, *args, tol=1e-7):
    errors = gradient_errors(f, args)
    assert all(error <= tol for error in errors), [f"{error:.1e}" for error in errors]

def assert_close(a, b, tol=1e-12):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.isfinite(a).all() and abs(a - b).max() <= tol * max(1e-30, abs(b).max()), (a, b)

def assert_adjoint(f, x):
    """<A x, v> = <x, A' v>."""
    y, back = f(x)
    v = normal(1, y.shape)
    assert abs((y * v).sum() - (x * back(v)).sum()) <= 1e-13 * np.sqrt((y * y).sum() * v.size)

@pytest.mark.parametrize("wrong, scale", [(0, 1), (1, 1), (0, 1e-9), (1, 1e-9)])
def test_the_tester_sees_a_gradient_wrong_by_one_in_ten_thousand(wrong, scale):
    def f(x, w, factor):
        y, back = stars.linear(np.tanh(x), w, np.zeros(3))
        def scaled(dy):
            dx, dw, _ = back(scale * dy)
            dx = dx * (1 - np.tanh(x) ** 2)
            return dx * (factor if wrong == 0 else 1), dw * (factor if wrong == 1 else 1)
        return scale * y, scaled
    args = normal(0, (4, 5), (3, 5))
    assert max(gradient_errors(lambda x, w: f(x, w, 1), args)) < 1e-8
    errors = gradient_errors(lambda x, w: f(x, w, 1.0001), args)
    assert errors[wrong] > 5e-5 and errors[1 - wrong] < 1e-8 and errors[2] > 1e-6
    assert gradient_errors(lambda x, w: f(x, w, 0), args)[wrong] == 1
    assert gradient_errors(lambda x, w: f(x, w, -1), args)[wrong] > 1

def test_the_tester_sees_an_argument_without_effect():
    assert gradient_errors(lambda x: (x[:1], lambda d: 0 * x), [[1., 2]]) == [1, 1]
    with pytest.raises(AssertionError):
        assert_gradient(lambda x: (np.zeros(3), lambda d: 0 * x), [1., 2])

def test_the_tester_sees_a_back_that_writes():
    def f(x):
        def back(dy):
            dy *= 2
            return dy
        return 2 * x, back
    with pytest.raises(ValueError, match="read-only"):
        assert_gradient(f, [1., 2])

# ---- 2  Operators --------------------------------------------------------------------------------

@checks(N=FEW, H=SIDE, W=SIDE, C=FEW, K=FEW, R=ODD, Q=ODD, d=st.sampled_from((1, 2)), seed=SEED)
def conv2d_is_a_direct_sum(S, N=2, H=6, W=5, C=3, K=2, R=3, Q=5, d=2, seed=0):
    x, w = normal(seed, (N, H, W, C), (K, C, R, Q))
    expected = np.zeros((N, -(-H // d), -(-W // d), K))
    for n, i, j, k in np.ndindex(expected.shape):
        for r, s in np.ndindex(R, Q):
            row, column = i * d + r - R // 2, j * d + s - Q // 2
            if 0 <= row < H and 0 <= column < W:
                expected[n, i, j, k] += x[n, row, column] @ w[k, :, r, s]
    assert_close(S.conv2d(x, w, d)[0], expected)

@checks(N=FEW, H=SIDE, W=SIDE, C=FEW, K=FEW, R=ODD, Q=ODD, d=st.sampled_from((1, 2)), seed=SEED)
def conv2d_gradient(S, N=2, H=6, W=5, C=3, K=2, R=3, Q=5, d=2, seed=0):
    x, w = normal(seed, (N, H, W, C), (K, C, R, Q))
    for w in (w, w.transpose(0, 1, 3, 2)):
        assert_gradient(lambda x, w: S.conv2d(x, w, d), x, w)
    assert_adjoint(lambda x: (S.conv2d(x, w, d)[0], lambda dy: S.conv2d(x, w, d)[1](dy)[0]), x)
    assert_adjoint(lambda w: (S.conv2d(x, w, d)[0], lambda dy: S.conv2d(x, w, d)[1](dy)[1]), w)

def batch_norm_case(seed, shape):
    x, gamma, beta, mean, var = normal(seed, shape, *[shape[-1:]] * 4)
    return 1 + 2 * x, gamma, beta, mean, 0.5 + var ** 2

SHAPES = st.sampled_from(((8, 3), (3, 4, 2), (2, 3, 4, 3), (2, 2, 3, 2, 1)))

@checks(shape=SHAPES, seed=SEED)
def batch_norm_is_its_definition(S, shape=(2, 3, 4, 3), seed=0):
    x, gamma, beta, mean, var = batch_norm_case(seed, shape)
    for train in (False, True):
        (y, running), _ = S.batch_norm(x, gamma, beta, mean, var, train)
        for c in range(shape[-1]):
            values = x[..., c].ravel().tolist()
            m = sum(values) / len(values)
            squares = sum((value - m) ** 2 for value in values)
            if train:
                v, unbiased = squares / len(values), squares / (len(values) - 1)
                assert_close(running[0][c], 0.9 * mean[c] + 0.1 * m)
                assert_close(running[1][c], 0.9 * var[c] + 0.1 * unbiased)
            else:
                m, v = mean[c], var[c]
                assert (running[0][c], running[1][c]) == (m, v)
            expected = [gamma[c] * (value - m) / math.sqrt(v + 1e-5) + beta[c] for value in values]
            assert_close(y[..., c].ravel(), expected)

@checks(shape=SHAPES, seed=SEED)
def batch_norm_gradient(S, shape=(2, 3, 4, 3), seed=0):
    x, gamma, beta, mean, var = batch_norm_case(seed, shape)
    for train in (False, True):
        def f(x, gamma, beta):
            (y, _), back = S.batch_norm(x, gamma, beta, mean, var, train)
            return y, back
        assert_gradient(f, x, gamma, beta)

@checks(N=FEW, D=FEW, K=FEW, seed=SEED)
def linear_is_its_definition(S, N=3, D=4, K=2, seed=0):
    x, w, b = map(away_from_zero, normal(seed, (N, D), (K, D), (K,)))
    expected = [[sum(x[n, d] * w[k, d] for d in range(D)) + b[k] for k in range(K)]
                for n in range(N)]
    assert_close(S.linear(x, w, b)[0], expected)
    assert_gradient(S.linear, x, w, b)
    assert_adjoint(lambda x: (S.linear(x, w, 0 * b)[0], lambda d: S.linear(x, w, b)[1](d)[0]), x)

def by_element(f, shape):
    return np.array([f(*index) for index in np.ndindex(*shape)]).reshape(shape)

@checks(N=FEW, H=FEW, W=FEW, C=FEW, T=FEW, more=st.integers(0, 5), seed=SEED)
def linear_operators_are_their_definitions(S, N=2, H=2, W=3, C=2, T=3, more=3, seed=0):
    rng = np.random.default_rng(seed)
    h, w, K, low = 2 * H, 2 * W, C + more, more // 2
    x, odd, long = normal(seed, (N, h, w, C), (N, h - 1, w - 1, C), (T * N, h, C))
    std = rng.uniform(0.5, 2, C)
    zero, mean = np.zeros(C), rng.normal(size=C)
    pad = int(rng.integers(0, min(h, w)))  # some of each image stays in view
    offsets, flips = S.draw_augmentation(rng, N, pad)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def kept(x):
        return lambda n, i, j, k: x[n, 2 * i, 2 * j, k - low] if 0 <= k - low < C else 0

    def cropped(n, i, j, c):
        return padded[n, i + offsets[n, 0], (w - 1 - j if flips[n] else j) + offsets[n, 1], c]

    for f, x_, shape, element in (
            (S.identity, x, x.shape, lambda *index: x[index]),
            (S.global_average_pool, x, (N, C),
             lambda n, c: sum(x[n, i, j, c] for i, j in np.ndindex(h, w)) / (h * w)),
            (S.upsample, x, (N, 2 * h, 2 * w, C), lambda n, i, j, c: x[n, i // 2, j // 2, c]),
            (lambda a: S.shortcut_a(a, K), x, (N, H, W, K), kept(x)),
            (lambda a: S.shortcut_a(a, K), odd, (N, H, W, K), kept(odd)),
            (lambda a: S.repeat_over_time(a, T), x, (T * N, h, w, C),
             lambda n, i, j, c: x[n % N, i, j, c]),
            (lambda a: S.mean_over_time(a, T), long, (N, h, C),
             lambda n, i, c: sum(long[t * N + n, i, c] for t in range(T)) / T),
            (lambda a: S.normalise(a, zero, std), x, x.shape, lambda *i: x[i] / std[i[-1]]),
            (lambda a: S.augment(a, offsets, flips, pad), x, x.shape, cropped)):
        assert_close(f(x_)[0], by_element(element, shape))
        assert_adjoint(f, x_)
        assert_gradient(f, x_)
    assert_close(S.normalise(x, mean, std)[0], by_element(
        lambda n, i, j, c: (x[n, i, j, c] - mean[c]) / std[c], x.shape))

@checks(N=FEW, K=st.integers(2, 5), seed=SEED)
def nonlinear_operators_are_their_definitions(S, N=3, K=4, seed=0):
    x = np.array(away_from_zero(normal(seed, (N, K))))
    x[0, 0] = 0.7  # one at least that relu lets through
    total = lambda n: sum(math.exp(v) for v in x[n])
    for f, element in (
            (S.relu, lambda v, n: max(0, v)),
            (S.leaky_relu, lambda v, n: v if v > 0 else v / 5),
            (lambda x: S.leaky_relu(x, 0.3), lambda v, n: v if v > 0 else 0.3 * v),
            (S.sigmoid, lambda v, n: 1 / (1 + math.exp(-v))),
            (S.log_softmax, lambda v, n: v - math.log(total(n)))):
        assert_close(f(x)[0], by_element(lambda n, k: element(x[n, k], n), x.shape))
        assert_gradient(f, x)
    assert_close(S.log_softmax(x + 2000)[0], S.log_softmax(x)[0])
    assert S.sigmoid(np.array([-2000., 2000]))[0].tolist() == [0, 1]

@checks(N=FEW, H=FEW, W=FEW, C=FEW, seed=SEED)
def max_pool_is_its_definition(S, N=2, H=2, W=3, C=2, seed=0):
    x = distinct(seed, N, 2 * H, 2 * W, C)
    assert_close(S.max_pool(x)[0], by_element(
        lambda n, i, j, c: x[n, 2 * i:2 * i + 2, 2 * j:2 * j + 2, c].max(), (N, H, W, C)))
    assert_gradient(S.max_pool, x)

@checks(B=st.integers(2, 5), D=st.integers(2, 5), seed=SEED)
def cosine_matrix_is_its_definition(S, B=4, D=3, seed=0):
    f = normal(seed, (B, D))
    expected = by_element(lambda i, j: f[i] @ f[j] / math.dist(f[i], 0 * f[i])
                          / math.dist(f[j], 0 * f[j]), (B, B))
    assert_close(S.cosine_matrix(f)[0], expected)
    assert_gradient(S.cosine_matrix, f)

@checks()
def relu_has_gradient_zero_at_zero(S):
    y, back = S.relu(fixed([-1., -0., 0, 2]))
    assert y.tolist() == [0, 0, 0, 2] and back(np.full(4, 3.)).tolist() == [0, 0, 0, 3]

@checks()
def leaky_relu_has_its_slope_at_zero(S):
    y, back = S.leaky_relu(fixed([-1., -0., 0, 2]), 0.25)
    assert y.tolist() == [-.25, 0, 0, 2] and back(np.full(4, 4.)).tolist() == [1, 1, 1, 4]

@checks()
def the_first_of_equals_wins_the_pool(S):
    windows = fixed([[[[1., 1], [1, 1]]], [[[0., 1], [1, 1]]], [[[0., 0], [1, 1]]]])
    y, back = S.max_pool(windows.reshape(3, 2, 2, 1))
    assert y.ravel().tolist() == [1, 1, 1]
    assert back(np.full((3, 1, 1, 1), 5.)).reshape(3, 4).tolist() == [
        [5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]]

@checks()
def cosines_with_a_zero_vector_are_zero_without_gradient(S):
    f = np.array(normal(0, (4, 3)))
    f[1] = 0
    y, back = S.cosine_matrix(fixed(f))
    df = back(normal(1, (4, 4)))
    assert not y[1].any() and not y[:, 1].any() and not df[1].any() and np.isfinite(df).all()
    assert_close(y[np.ix_([0, 2, 3], [0, 2, 3])], S.cosine_matrix(f[[0, 2, 3]])[0])
    def others(rest):
        matrix, back = S.cosine_matrix(np.insert(rest, 1, 0, axis=0))
        return matrix, lambda d: back(d)[[0, 2, 3]]
    assert_gradient(others, f[[0, 2, 3]])

def operator_cases(S, seed=0):
    """(name, f, arguments), f -> (value, back): every operator and loss, away from its kinks."""
    draw = lambda *shape: normal(seed + math.prod(shape), shape)
    x, f, g = away_from_zero(draw(3, 4, 6, 2)), draw(4, 5), draw(4, 6)
    vectors = [*normal(seed, (2,), (2,), (2,)), fixed([0.7, 1.6])]
    offsets, flips = np.array([[0, 1], [8, 4], [3, 7]]), np.array([True, False, True])
    weights, bias = normal(seed, (3, 2, 3, 3), (5,))
    def norm(train):
        def f(x, gamma, beta, mean, var):
            (y, _), back = S.batch_norm(x, gamma, beta, mean, var, train)
            return y, lambda dy: back(dy)
        return f
    def neuron(*options):
        return lambda current: S.lif(current, 3, 0.8, 1.3, S.Neuron(*options))
    return [
        ("conv2d", S.conv2d, (x, weights)), ("conv2d/2", lambda x, w: S.conv2d(x, w, 2),
                                            (x, weights)),
        ("batch_norm eval", norm(False), (x, *vectors)),
        ("batch_norm train", norm(True), (x, *vectors)),
        ("relu", S.relu, (x,)), ("leaky_relu", S.leaky_relu, (x,)), ("sigmoid", S.sigmoid, (x,)),
        ("linear", S.linear, (f, draw(5, 5), bias)), ("max_pool", S.max_pool, (x,)),
        ("global_average_pool", S.global_average_pool, (x,)), 
        ("upsample", S.upsample, (x,)), ("shortcut_a", lambda x: S.shortcut_a(x, 5), (x,)),
        ("log_softmax", S.log_softmax, (f,)),
        ("cosine_matrix", S.cosine_matrix, (f,)),
        ("repeat_over_time", lambda x: S.repeat_over_time(x, 2), (x,)),
        ("mean_over_time", lambda x: S.mean_over_time(x, 3), (x,)),
        ("normalise", lambda x: S.normalise(x, (0.4, 0.5), (0.2, 0.3)), (x,)),
        ("augment", lambda x: S.augment(x, offsets, flips), (x,)),
        *((f"lif {reset} {surrogate} {detach}", neuron(0.6, reset, 0.3, surrogate, detach), (x,))
          for reset in ("hard", "soft") for surrogate in S.SURROGATES for detach in (True, False)),
        ("bn_matching", S.bn_matching, (x, *vectors[2:])), ("class_prior", S.class_prior, (f,)),
        ("balance", S.balance, (f,)), ("adversarial", S.adversarial, (f, f + 0.1 * draw(4, 5))),
        ("rate_mapping", lambda z, y: S.rate_mapping(z, y, 3, 0.7, 1.3), (x, draw(1, 4, 6, 5))),
        ("rca", S.rca, (f, g)), ("distillation_loss", S.distillation_loss, (f, draw(5, 5)[:4])),
        ("tar", lambda a, *v: S.tar(a, *v, (0.2, 0.1, 0.02)), (x, *vectors[:1], *vectors[2:]))]

def outputs(f, args):
    """The value, and the gradients for a fixed projection of it, in the dtype of the arguments."""
    value, back = f(*args)
    grads = back(args[0].dtype.type(1.5) * stars.xp.ones_like(value))
    return [value, *(grads if isinstance(grads, tuple) else (grads,))]

def test_float32_stays_float32_and_agrees_with_float64():
    for name, f, args in operator_cases(stars):
        single = outputs(f, [a.astype(np.float32) for a in args])
        for low, high in zip(single, outputs(f, args), strict=True):
            if low.ndim or np.__version__ >= "2":  # before, a scalar and a number made a float64
                assert low.dtype == np.float32 and high.dtype == np.float64, name
            assert abs(low - high).max() <= 2e-5 * max(abs(high).max(), 1), name

@checks()
def skipped_gradients_are_none_and_the_others_unchanged(S):
    x, w = normal(0, (2, 4, 4, 3), (5, 3, 3, 3))
    gamma, beta, mean, var = batch_norm_case(0, (2, 3))[1:]
    flat, weight, bias = normal(1, (4, 5), (3, 5), (3,))
    for f, args in ((S.conv2d, (x, w)), (S.linear, (flat, weight, bias)),
                    *((lambda *a, need="xp", train=train: (lambda v, back: (v[0], back))(
                        *S.batch_norm(*a, mean, var, train, need=need)), (x, gamma, beta))
                      for train in (False, True))):
        value, back = f(*args)
        dy = normal(2, value.shape)
        full = back(dy)
        for need in ("xp", "px", "x", "p", ""):
            same, back = f(*args, need=need)
            assert (same == value).all()
            for g, whole, wanted in zip(back(dy), full, ("x", "p", "p"), strict=False):
                assert (g == whole).all() if wanted in need else g is None

# ---- 3  Spiking neuron ---------------------------------------------------------------------------

SLOPES = {"sigmoid": lambda x: 4 * math.exp(-4 * x) / (1 + math.exp(-4 * x)) ** 2,
          "atan": lambda x: 1 / (1 + (math.pi * x) ** 2),
          "triangle": lambda x: max(0, 1 - abs(x))}

def neurons(S, lam, v_init, detached=(True, False)):
    for reset, surrogate, detach in itertools.product(("hard", "soft"), SLOPES, detached):
        yield S.Neuron(lam, reset, v_init, surrogate, detach)

def lif_by_hand(current, T, V, A, neuron, train=None, spike=lambda x: 1.0 if x >= 0 else 0.0):
    """Eq. (1), a neuron and a step at a time -> z and its train: (s, u) of each neuron and step.

    With a train: its frozen linearisation s + g'((u0 - V)/V)/V (u - u0), whose derivative is
    Eq. (2); a detached reset sees the s of the train.
    """
    steps, met = current.reshape(T, -1), {}
    z = np.zeros(steps.shape)
    for n in range(steps.shape[1]):
        u, s = neuron.v_init * V, 0.0
        for t in range(T):
            u = neuron.lam * (u * (1 - s) if neuron.reset == "hard" else u - V * s) + steps[t, n]
            if train:
                s0, u0 = train[t, n]
                s = s0 + SLOPES[neuron.surrogate]((u0 - V) / V) / V * (u - u0)
            else:
                s = spike((u - V) / V)
            z[t, n], met[t, n] = A * s, (s, u)
            s = s0 if train and neuron.detach_reset else s
    return z.reshape(current.shape), met

LIF = dict(T=st.integers(1, 5), shape=st.sampled_from(((2, 3), (1, 2, 1, 2), (3,))),
           lam=st.sampled_from((0.0, 0.5, 0.9, 1.0)), v_init=st.sampled_from((0.0, 0.5, 1.2)),
           V=st.sampled_from((0.4, 1.0, 1.7)), A=st.sampled_from((0.6, 1.0, 2.5)), seed=SEED)

def currents(seed, T, shape, V, lam, v_init):
    current = np.array(V * (0.5 + normal(seed, (T * shape[0], *shape[1:]))))
    current.flat[0] = 0.8 * V * (1 - lam * v_init)  # one u at least in reach of every surrogate
    return fixed(current)

@checks(**LIF)
def lif_is_equation_1(S, T=4, shape=(2, 3), lam=0.5, v_init=0.5, V=1.7, A=0.6, seed=0):
    current = currents(seed, T, shape, V, lam, v_init)
    for neuron in neurons(S, lam, v_init):
        assert_close(S.lif(current, T, V, A, neuron)[0] + 1,
                     lif_by_hand(current, T, V, A, neuron)[0] + 1)
        primitive = S.SURROGATES[neuron.surrogate][0]  # of which each u can be seen
        assert_close(S.lif(current, T, V, A, neuron, primitive)[0],
                     lif_by_hand(current, T, V, A, neuron, None, primitive)[0], 1e-11)

@checks(**LIF)
def lif_gradient_of_a_smooth_spike(S, T=4, shape=(2, 3), lam=0.5, v_init=0.5, V=1.7, A=0.6, seed=0):
    current = currents(seed, T, shape, V, lam, v_init)
    for neuron in neurons(S, lam, v_init, detached=(False,)):
        primitive = S.SURROGATES[neuron.surrogate][0]
        assert_gradient(lambda c: S.lif(c, T, V, A, neuron, primitive), current)

def assert_surrogate_gradient(S, current, T, V, A, neuron):
    train = lif_by_hand(current, T, V, A, neuron)[1]
    back = S.lif(current, T, V, A, neuron)[1]
    assert_gradient(lambda c: (lif_by_hand(c, T, V, A, neuron, train)[0], back), current)

@checks(**LIF)
def lif_gradient_at_real_spikes(S, T=4, shape=(2, 3), lam=0.5, v_init=0.5, V=1.7, A=0.6, seed=0):
    current = currents(seed, T, shape, V, lam, v_init)
    for neuron in neurons(S, lam, v_init):
        assert_surrogate_gradient(S, current, T, V, A, neuron)

@checks(V=st.sampled_from((0.3, 1.0, 1.7)), A=st.sampled_from((0.6, 2.5)))
def lif_spikes_at_its_threshold_and_not_below(S, V=1.7, A=0.6):
    first = [V, np.nextafter(V, 0), np.nextafter(V, np.inf)]
    for neuron in neurons(S, 0.5, 0.0):
        for second in (0.0, 0.6 * V, V):
            current = fixed([first, [second] * 3, [0.9 * V] * 3])
            z = S.lif(current, 3, V, A, neuron)[0]
            assert z[0].tolist() == [A, 0, A]
            assert_close(z + 1, lif_by_hand(current, 3, V, A, neuron)[0] + 1)
            assert_surrogate_gradient(S, current, 3, V, A, neuron)

@checks(seed=SEED)
def surrogates_are_the_slopes_of_their_primitives(S, seed=0):
    x = 3 * normal(seed, (20,))
    assert set(S.SURROGATES) == set(SLOPES)
    for name, (primitive, slope) in S.SURROGATES.items():
        assert_close(slope(x), [SLOPES[name](v) for v in x], 1e-11)
        assert_gradient(lambda x: (primitive(x), lambda dy: dy * slope(x)),
                        fixed(np.append(x.clip(-.9, .9), 0.3)))
        assert primitive(0.0) == 0.5 and abs(primitive(1e9) - 1) < 1e-9 > abs(primitive(-1e9))
        assert abs(primitive(x) + primitive(-x) - 1).max() < 1e-15

class FrozenSpikes:
    """An activation: real spikes in the first pass, their frozen linearisation in later ones."""
    def __init__(self, S, T, neuron, V=1.0, A=1.0):
        self.args, self.S, self.train = (T, V, A, neuron, self.spike), S, []
        self.slope, self.replay = S.SURROGATES[neuron.surrogate][1], None
    def again(self):
        self.replay = iter(self.train) if self.train else None
        return self
    def spike(self, x):
        if self.replay is None:
            self.train.append((x, (x >= 0) * 1.0))
            return self.train[-1][1]
        x0, s0 = next(self.replay)
        return s0 + self.slope(x0) * (x - x0)
    def __call__(self, current):
        return self.S.lif(current, *self.args)

# ---- 4  Networks ---------------------------------------------------------------------------------

def smooth(x):
    """A stack of relus has a kink near every draw; a stack of these has none."""
    y = np.tanh(x)
    return y, lambda dy: dy * (1 - y * y)

FAMILIES = {  # name: (arguments of weight_shapes, side of the image)
    "option A": (("resnet8", 3, 2, False), 8), "projection": (("resnet8", 3, 2, True), 8),
    "resnet18": (("resnet18", 3, 2), 16), "vgg11": (("vgg11", 3, 2), 32)}

def weights_of(S, shapes, seed=0):
    """Weights with nothing left at 1 or 0: norms of both signs, statistics that move things."""
    rng = np.random.default_rng(seed)
    params = S.init_weights(shapes, rng, np.float64)
    for name, value in params.items():
        if value.ndim == 1:
            value = value + 0.4 * rng.normal(size=value.shape)
            if name.endswith("var"):
                value = 0.4 + abs(value)
            elif name.endswith("weight"):
                value *= rng.choice([-1, 1, 1, 1], value.shape)
        last = name in ("linear.weight", "classifier.weight")
        params[name] = fixed(value * (5 if last else 1))  # so that not all images look alike
    return params

def net_of(S, family, activation, T=1, seed=0):
    params = weights_of(S, S.weight_shapes(*FAMILIES[family][0]), seed)
    return S.Net(params, activation, T, (0.4, 0.5, 0.45), (0.25, 0.2, 0.3))

def images_of(family, n=3, seed=0):
    side = FAMILIES[family][1]
    return fixed(np.random.default_rng(seed).random((n, side, side, 3)))

def smooth_spikes(S, T, detach=False):
    """A neuron with the primitive of its surrogate for a spike: time, reset and BPTT, no kink."""
    neuron = S.Neuron(0.7, "soft", 0.3, "sigmoid", detach)
    primitive = S.SURROGATES["sigmoid"][0]
    return lambda current: S.lif(current, T, 0.9, 1.2, neuron, primitive)

def trainable(params):
    return [name for name in params if "running" not in name]

def assert_network_gradient(S, net, x, tol=1e-6, train=True):
    """Logits and features, to the pixels and to every weight."""
    names = trainable(net.params)
    def f(x, *values):
        if isinstance(net.activation, FrozenSpikes):
            net.activation.again()
        params = {**net.params, **dict(zip(names, values))}
        out, back = S.forward(net._replace(params=params), x, train=train)
        def both(d):
            dx, grads = back(d[:, :3], d[:, 3:])
            assert set(grads) == set(names)
            return dx, *(grads[name] for name in names)
        return np.concatenate([out.logits, out.features], 1), both
    assert_gradient(f, x, *(net.params[name] for name in names), tol=tol)

def network_gradient(family, *modes):
    @checks(f"network_gradient_{family}")
    def check(S):
        for train, T in modes:
            activation = smooth_spikes(S, T) if T > 1 else smooth
            assert_network_gradient(S, net_of(S, family, activation, T), images_of(family), 1e-6,
                                    train)

for _family in FAMILIES:
    network_gradient(_family, (True, 3), *[(False, 1), (False, 2), (True, 1)]
                     [:3 if "resnet18" not in _family else 1])

@checks()
def network_gradient_at_real_spikes(S):
    for reset in ("hard", "soft"):
        neuron = S.Neuron(0.8, reset, 0.4, "atan", False)
        for train in (False, True):
            frozen = FrozenSpikes(S, 3, neuron, 0.8, 1.3)
            assert_network_gradient(S, net_of(S, "option A", frozen, 3), images_of("option A"),
                                    train=train)
            assert 0.1 < np.concatenate([s.ravel() for _, s in frozen.train]).mean() < 0.9

def simulate(S, net, x):
    """A student in eval mode as it would run in hardware: one step after the other, joules counted.

    Returns logits, features, {layer: firing rate}, joules an image of Eq. (11), and of the ANN.
    """
    p, neuron, state, fired = net.params, net.activation, {}, {}
    joules = {"spiking": 0.0, "ann": 0.0}
    def count(name, inputs, macs, t, spikes=True):
        joules["ann"] += 4.6e-12 * macs * (t == 0)
        if spikes:
            joules["spiking"] += 0.9e-12 * macs * (inputs != 0).mean()
        else:
            joules["spiking"] += 4.6e-12 * macs * (t == 0)
    def conv(name, z, stride, t, spikes=True):
        a = S.conv2d(z, p[name + ".weight"], stride)[0]
        macs = sum(p[name + ".weight"][k].size for _, _, k in np.ndindex(a.shape[1:]))
        count(name, z, macs, t, spikes)
        return a
    def norm(name, a):
        sd = np.sqrt(p[name + ".running_var"] + 1e-5)
        return (a - p[name + ".running_mean"]) / sd * p[name + ".weight"] + p[name + ".bias"]
    def fire(name, current):
        V, A = float(p.get(name + ".v_th", 1)), float(p.get(name + ".amplitude", 1))
        u, s = state.get(name, (neuron.v_init * V, 0))
        u = neuron.lam * (u * (1 - s) if neuron.reset == "hard" else u - V * s) + current
        state[name] = u, (u >= V) * 1.0
        fired.setdefault(name, []).append((u >= V).mean())
        return A * state[name][1]
    def resnet(t):
        z = fire("bn1", norm("bn1", conv("conv1", x, 1, t, spikes=False)))
        for stage, block in itertools.product(range(1, 5), range(2)):
            name = f"layer{stage}.{block}"
            if name + ".conv1.weight" not in p:
                continue
            stride = 2 if stage > 1 and block == 0 else 1
            y = fire(name + ".bn1", norm(name + ".bn1", conv(name + ".conv1", z, stride, t)))
            if name + ".shortcut.0.weight" in p:
                z = norm(name + ".shortcut.1", conv(name + ".shortcut.0", z, stride, t))
            else:
                z = z[:, ::stride, ::stride]
                extra = p[name + ".conv2.weight"].shape[0] - z.shape[3]
                z = np.pad(z, ((0, 0),) * 3 + ((extra // 2, extra - extra // 2),))
                joules["spiking"] += 0.9e-12 * (z != 0).sum() / len(z)
            z = fire(name + ".bn2", z + norm(name + ".bn2", conv(name + ".conv2", y, 1, t)))
        return z
    def vgg(t):
        z, n, binary = x, 0, False
        for convs in (1, 1, 2, 2, 2):
            for _ in range(convs):
                a = norm(f"features.{n + 1}", conv(f"features.{n}", z, 1, t, spikes=binary))
                z, n, binary = fire(f"features.{n + 1}", a), n + 3, True
            N, H, W, C = z.shape
            z, n = z.reshape(N, H // 2, 2, W // 2, 2, C).max((2, 4)), n + 1
        return z
    body, last = (resnet, "linear") if "conv1.weight" in p else (vgg, "classifier")
    features = np.mean([body(t).mean((1, 2)) for t in range(net.T)], 0)
    w = p[last + ".weight"]
    count(last, features, w.size, 0, spikes=False)
    rates = {name: np.mean(shares) for name, shares in fired.items()}
    return (features @ w.T + p[last + ".bias"], features, rates, joules["spiking"], joules["ann"])

@checks()
def students_and_energy_are_their_simulation(S):
    for family, reset in itertools.product(FAMILIES, ("hard", "soft")):
        net = net_of(S, family, S.Neuron(0.8, reset, 0.5), 3)
        thresholds = {}
        for i, name in enumerate(S.batch_norms(net.params)):
            thresholds[name + ".v_th"] = 0.6 + 0.1 * (i % 5)
            thresholds[name + ".amplitude"] = np.array(0.8 + 0.2 * (i % 3))
        net = net._replace(params=net.params | thresholds)
        x = normal(5, images_of(family).shape)
        if family == "option A":  # an image of two values is no spike train
            x = fixed((x > 0) * 2.0)
        out, _ = S.forward(net, x, need="", measure=True)
        logits, features, rates, joules, ann = simulate(S, net, x)
        assert_close(out.logits, logits)
        assert_close(out.features, features)
        assert out.rates.keys() == rates.keys()
        assert_close([out.rates[k] for k in rates], [*rates.values()])
        assert 0.02 < np.mean([*rates.values()]) < 0.9
        assert_close(S.energy(out.costs, net.T), (joules, ann))
        out, _ = S.forward(net._replace(activation=S.relu, T=1), x, need="", measure=True)
        assert_close(S.energy(out.costs, 1), (ann, ann))
    with pytest.raises(ValueError, match="measure=True"):
        S.energy([], 1)

@checks()
def teachers_are_students_of_one_step_with_relu(S):
    for family in FAMILIES:
        net, x = net_of(S, family, S.relu), images_of(family)
        always = lambda a: S.lif(a, 1, 1, 1, S.Neuron(), lambda drive: np.maximum(drive + 1, 0))
        assert_close(S.forward(net, x)[0].logits,
                     S.forward(net._replace(activation=always), x)[0].logits)
        for activation in (S.relu, S.identity):  # without a memory all steps are the same
            once, thrice = (S.forward(net._replace(activation=activation, T=T), x)[0].logits
                            for T in (1, 3))
            assert_close(once, thrice)

@checks()
def batch_statistics_are_taken_over_images_and_steps(S):
    """Train mode is eval mode at the statistics of the batch, and returns the next ones."""
    for family, T in (("option A", 3), ("projection", 1), ("vgg11", 2)):
        net, x = net_of(S, family, smooth_spikes(S, T), T), images_of(family)
        inputs = {}
        out, _ = S.forward(net, x, train=True, tap=inputs.__setitem__)
        assert list(inputs) and set(inputs) == set(S.batch_norms(net.params))
        assert [len(a) for a in inputs.values()] == [3] + [3 * T] * (len(inputs) - 1)
        own = {}
        for layer, a in inputs.items():
            a = a.reshape(-1, a.shape[-1])
            for name, value, next_value in (("running_mean", a.mean(0), a.mean(0)),
                                            ("running_var", a.var(0), a.var(0, ddof=1))):
                own[f"{layer}.{name}"] = value
                assert_close(out.running[f"{layer}.{name}"],
                             0.9 * net.params[f"{layer}.{name}"] + 0.1 * next_value)
        same, _ = S.forward(net._replace(params=net.params | own), x)
        assert_close(out.logits, same.logits, 1e-10)
        assert same.running == {} == same.rates and same.costs == []

@checks()
def networks_skip_gradients_and_take_taps(S):
    for family in ("option A", "projection", "vgg11"):
        net, x = net_of(S, family, smooth), images_of(family)
        dlogits = normal(3, (3, 3))
        tap = lambda layer, a: lambda da: da + 2 * a  # the gradient of the sum of its squares
        dx, grads = S.forward(net, x, tap=tap)[1](dlogits)
        only_x = S.forward(net, x, tap=tap, need="x")[1](dlogits)
        only_p = S.forward(net, x, tap=tap, need="p")[1](dlogits)
        assert (only_x[0] == dx).all() and only_x[1] == {} and only_p[0] is None
        assert grads.keys() == only_p[1].keys() == set(trainable(net.params))
        assert all((grads[k] == only_p[1][k]).all() for k in grads)
        def tapped(x):
            losses = []
            out, _ = S.forward(net, x, tap=lambda layer, a: losses.append((a * a).sum()))
            return (out.logits * dlogits).sum() + sum(losses), lambda d: d * dx
        assert_gradient(tapped, x, tol=1e-6)

@checks()
def networks_are_watched(S):
    """watch sees the outputs that spike, once each, and what it returns joins the gradient."""
    for family, T in (("option A", 2), ("projection", 1), ("vgg11", 2)):
        net, x = net_of(S, family, smooth_spikes(S, T), T), images_of(family)
        dlogits, seen = normal(3, (3, 3)), {}
        def watched(x):
            losses = []
            def watch(layer, z):
                seen[layer] = seen.get(layer, 0) + 1
                total = z.reshape(T, len(x), -1).sum(0)
                losses.append((total * total).sum())
                return lambda: 2 * total.reshape(z[:len(x)].shape)
            out, back = S.forward(net, x, watch=watch)
            return (out.logits * dlogits).sum() + sum(losses), lambda d: d * back(dlogits)[0]
        assert_gradient(watched, x, tol=1e-6)
        assert {*seen} == {k for k in S.batch_norms(net.params) if "shortcut" not in k}
        assert all(S.forward(net, x, watch=lambda layer, z: back)[1](dlogits)[0].any()
                   for back in (None, lambda: None))

def generator_case(S, size=8, classes=0, n=4, seed=0):
    """Weights, latents, labels; of a class-conditional generator the latents end in them."""
    z, labels = normal(seed + 1, (n, 5)), np.arange(n) % classes if classes else None
    z = np.concatenate([z, np.eye(classes)[labels]], 1) if classes else z
    return weights_of(S, S.generator_shapes(size, 4, z.shape[1]), seed), z, labels

@checks()
def generator_is_its_layers(S):
    for size, classes in ((8, 0), (32, 3), (64, 0)):
        p, z, _ = generator_case(S, size, classes)
        y = (z @ p["fc.weight"].T + p["fc.bias"]).reshape(len(z), 4, size // 4, size // 4)
        y = y.transpose(0, 2, 3, 1)
        for i in range(3):
            if i:
                y = S.conv2d(y.repeat(2, 1).repeat(2, 2), p[f"conv{i}.weight"])[0]
            y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
            y = y * p[f"bn{i}.weight"] + p[f"bn{i}.bias"]
            y = np.where(y > 0, y, 0.2 * y) if i else y
        y = S.conv2d(y, p["conv3.weight"])[0] + p["conv3.bias"]
        images, _ = S.generator(p, z)
        assert images.shape == (len(z), size, size, 3)
        assert_close(images, 1 / (1 + np.exp(-y)))

@checks()
def generator_gradient(S):
    for size, classes in ((8, 0), (16, 3)):
        params, z, _ = generator_case(S, size, classes)
        def f(z, *values):
            p = dict(zip(params, values))
            images, back = S.generator(p, z, "xp", smooth)
            def both(d):
                dz, grads = back(d)
                only_z, none = S.generator(p, z, "x", smooth)[1](d)
                only_p = S.generator(p, z, activation=smooth)[1](d)[1]
                assert (only_z == dz).all() and none == {}
                assert grads.keys() == only_p.keys() == params.keys()
                assert all((only_p[name] == grads[name]).all() for name in params)
                return dz, *(grads[name] for name in params)
            return images, both
        assert_gradient(f, z, *params.values(), tol=1e-6)

# ---- 5  Losses -----------------------------------------------------------------------------------

def entropy_terms(logits):
    """Rows of log softmax, by their definition."""
    return [[v - math.log(sum(math.exp(u) for u in row)) for v in row] for row in logits.tolist()]

B_K = dict(B=st.integers(2, 5), K=st.integers(2, 5), seed=SEED)

@checks(shape=SHAPES, seed=SEED)
def bn_matching_is_equation_3(S, shape=(2, 3, 4, 3), seed=0):
    a, _, _, mean, var = batch_norm_case(seed, shape)
    rows = a.reshape(-1, shape[-1])
    mu = [sum(column) / len(rows) for column in rows.T]
    sigma = [sum((v - m) ** 2 for v in column) / len(rows) for column, m in zip(rows.T, mu)]
    assert_close(S.bn_matching(a, mean, var)[0], math.dist(mu, mean) + math.dist(sigma, var))
    assert_gradient(lambda a: S.bn_matching(a, mean, var), a)

@checks()
def a_norm_at_zero_has_gradient_zero(S):
    a, mean, var = fixed([[1., 5], [3, 9]]), np.array([2., 7]), np.array([1., 4])
    loss, back = S.bn_matching(a, mean, var)
    assert loss == 0 and not back(1.0).any()
    loss, back = S.bn_matching(a, mean, var - [3, 4])  # only the mean matches
    assert loss == 5 and assert_close(back(1.0), (a - mean) * [0.6, 0.8]) is None
    loss, back = S.bn_matching(a, mean - [3, 4], var)  # only the variance
    assert loss == 5 and assert_close(back(1.0), [[0.3, 0.4]] * 2) is None

@checks(**B_K)
def class_prior_is_equation_4(S, B=4, K=3, seed=0):
    t = distinct(seed, B, K) * 5
    log_p = entropy_terms(t)
    labels = np.random.default_rng(seed).integers(0, K, B)
    assert_close(S.class_prior(t)[0], -sum(max(row) for row in log_p) / B)
    assert_close(S.class_prior(t, labels)[0], -sum(log_p[b][labels[b]] for b in range(B)) / B)
    assert_gradient(S.class_prior, t)
    assert_gradient(lambda t: S.class_prior(t, labels), t)

@checks(**B_K)
def balance_is_equation_5(S, B=4, K=3, seed=0):
    t = fixed(normal(seed, (B, K)) + 3 * (np.arange(K) == 0))  # well away from the even balance
    p = [sum(math.exp(row[k]) for row in entropy_terms(t)) / B for k in range(K)]
    assert_close(S.balance(t)[0], sum(v * math.log(v) for v in p))
    assert_gradient(S.balance, t)
    loss, back = S.balance(fixed([[2000., 0], [2000., 0]]))  # a class that nobody is in
    assert loss == 0 and np.isfinite(back(1.0)).all()

def half_agreeing(seed, B, K):
    """Logits whose argmax agrees in the even rows and not in the odd ones."""
    t, s = map(np.array, normal(seed, (B, K), (B, K)))
    for b, row in enumerate(s):
        winner, wanted = row.argmax(), (t[b].argmax() + b % 2) % K
        row[[winner, wanted]] = row[[wanted, winner]]
        row[wanted] += 0.1
        t[b, t[b].argmax()] += 0.5
    return fixed(t), fixed(s)

@checks(**B_K)
def adversarial_is_equation_6(S, B=5, K=3, seed=0):
    t, s = half_agreeing(seed, B, K)
    log_t, log_s = entropy_terms(t), entropy_terms(s)
    kl = [sum(math.exp(u) * (u - v) for u, v in zip(*rows)) for rows in zip(log_t, log_s)]
    assert_close(S.adversarial(t, s)[0] - 1, -sum(kl[::2]) / B - 1)
    assert_gradient(S.adversarial, t, s)

@checks()
def rows_that_disagree_are_masked_from_the_adversary(S):
    t, s = half_agreeing(0, 4, 3)
    loss, back = S.adversarial(t, s)
    alone, back_alone = S.adversarial(t[::2], s[::2])
    assert loss == alone / 2 and S.adversarial(t[1::2], s[1::2])[0] == 0
    for d, d_alone in zip(back(1.0), back_alone(1.0)):
        assert not d[1::2].any() and (d[::2] == d_alone / 2).all() and d_alone.any()
    tie = fixed([[1., 1, 0]])  # of equal logits the first counts
    assert S.adversarial(tie, fixed([[3., 2, 0]]))[0] < 0 == S.adversarial(
        tie, fixed([[2., 3, 0]]))[0]

@checks(B=st.integers(2, 5), D=st.integers(2, 5), E=st.integers(2, 5), seed=SEED)
def rca_is_equation_7(S, B=4, D=3, E=5, seed=0):
    f_t, f_s = normal(seed, (B, D), (B, E))
    cos = lambda f, i, j: f[i] @ f[j] / (math.hypot(*f[i]) * math.hypot(*f[j]))
    pairs = [(i, j) for i, j in np.ndindex(B, B) if i != j]
    assert_close(S.rca(f_t, f_s)[0],
                 sum((cos(f_t, i, j) - cos(f_s, i, j)) ** 2 for i, j in pairs) / len(pairs))
    assert_gradient(S.rca, f_t, f_s)

@checks()
def rca_leaves_out_dead_features_and_the_diagonal(S):
    f_t, f_s = normal(0, (4, 3), (4, 5))
    dead = fixed(f_s * [[0], [1], [1], [1]])
    loss, back = S.rca(f_t, dead)  # cos_S of row 0 is 0, on the diagonal as well, where cos_T is 1
    unit_t, unit_s = (f / np.sqrt((f * f).sum(1) + (f == 0).all(1))[:, None] for f in (f_t, dead))
    gaps = (unit_t @ unit_t.T - unit_s @ unit_s.T)[~np.eye(4, dtype=bool)]
    assert_close(loss, (gaps ** 2).mean())
    df_t, df_s = back(1.0)
    assert not df_s[0].any() and df_t[0].any() and np.isfinite(df_s).all()
    def f(f_t, rest):
        loss, back = S.rca(f_t, np.insert(rest, 0, 0, axis=0))
        return loss, lambda d: (back(d)[0], back(d)[1][1:])
    assert_gradient(f, f_t, dead[1:])

TAR = dict(shape=SHAPES, tau=st.sampled_from((0.5, 1.0)), seed=SEED)

def exceedances(a, gamma, mean, var, kappa, tau):
    """e_ck of Eq. (8), one value after the other."""
    rows, e = a.reshape(-1, a.shape[-1]), []
    for c, k in itertools.product(range(a.shape[-1]), kappa):
        h = [np.sign(gamma[c]) * (v - mean[c]) / math.sqrt(var[c] + 1e-5) for v in rows[:, c]]
        e.append((sum(1 / (1 + math.exp((k - v) / tau)) for v in h) / len(h)))
    return e

@checks(**TAR)
def tar_is_equation_8(S, shape=(2, 3, 4, 3), tau=0.5, seed=0):
    a, gamma, _, mean, var = batch_norm_case(seed, shape)
    kappa, pi = (0.5, 1.0, 2), (0.3, 0.16, 0.03)
    e = exceedances(a, gamma, mean, var, kappa, tau)
    target = list(pi) * shape[-1]
    expected = sum((v - p) ** 2 / (p * (1 - p)) for v, p in zip(e, target)) / len(e)
    assert_close(S.tar(a, gamma, mean, var, pi, kappa, tau)[0], expected)
    assert_gradient(lambda a: S.tar(a, gamma, mean, var, pi, kappa, tau), a)

@checks()
def tar_of_a_dead_channel_is_finite(S):
    gamma, zero = np.ones(2), np.zeros(2)
    a = fixed([[0., 0], [0, 1e-3], [0, 2e-3]])  # channel 0 stays at its mean
    loss, back = S.tar(a, gamma, zero, zero, (0.16,), (1,))
    assert np.isfinite(loss) and back(1.0)[:, 0].any() and np.isfinite(back(1.0)).all()
    e = 1 / (1 + math.exp(4))
    assert_close(S.tar(a[:, :1], gamma[:1], zero[:1], zero[:1], (0.16,), (1,))[0],
                 (e - 0.16) ** 2 / (0.16 * 0.84))
    assert_gradient(lambda b: (lambda loss, back: (loss, lambda d: 1e-3 * back(d)))(
        *S.tar(1e-3 * b, gamma, zero, zero, (0.16,), (1,))), 1e3 * a)

@checks()
def tar_looks_towards_firing_by_the_sign_of_gamma(S):
    a, _, _, mean, var = batch_norm_case(0, (5, 3))
    gamma = np.array([1.5, -0.5, 0])
    args = (mean, var, (0.2, 0.05), (1, 2))
    loss, back = S.tar(a, gamma, *args)
    mirrored = fixed(np.where(gamma < 0, 2 * mean - a, np.where(gamma == 0, mean, a)))
    same, back_same = S.tar(mirrored, np.ones(3), *args)
    assert_close(loss, same)
    assert_close(back(1.0), back_same(1.0) * np.sign(gamma))
    assert not back(1.0)[:, 2].any()
    assert_gradient(lambda a: S.tar(a, gamma, *args), a)

@checks()
def tail_targets_are_expectations_under_their_law(S):
    kappa, tau, K = (0.5, 1, 2.5), 0.3, 4
    x = np.arange(-60, 60, 1 / 256) + 1 / 512
    normal = lambda m, sd: np.exp(-((x - m) / sd) ** 2 / 2) / (sd * math.sqrt(2 * math.pi))
    for first, last in ((0, 0), (0, 2), (1.5, 0.5)):
        targets = S.Tail(kappa, tau, (first, last)).targets(3, K)
        for pi, shift in zip(targets, (first, (first + last) / 2, last), strict=True):
            sd = 1 / math.sqrt(1 + shift ** 2 * (K - 1) / K ** 2)
            low, high = -shift * sd / K, shift * sd * (K - 1) / K
            density = (1 - 1 / K) * normal(low, sd) + normal(high, sd) / K
            assert abs((density * x ** 2).sum() / 256 - 1) < 1e-12 > abs((density * x).sum())
            assert_close(pi, [(density * (0.5 + 0.5 * np.tanh((x - k) / (2 * tau)))).sum() / 256
                              for k in kappa], 1e-6)
    assert_close(S.Tail(shift=(0, 0)).targets(2, 10), [[0.1805, 0.0343, 0.0033]] * 2, 1e-3)

def at_every_step(f, y, T, *more):
    """A layer of Eq. (12) as a function of z, with the gradient on all of z."""
    def value(z):
        loss, back = f(z, y, T, *more)
        return loss, lambda dloss: np.concatenate([back(dloss)] * T)
    return value

@checks(T=st.integers(1, 4), seed=SEED)
def rate_matching_is_equation_12(S, T=3, seed=0):
    z, y = normal(seed, (T * 2, 2, 3, 2), (2, 2, 3, 2))
    V, A, n = 0.7, 1.3, 400
    e_t = [sum(v > V * (i + 0.5) / n for i in range(n)) / n for v in y.ravel()]  # of n thresholds
    e_s = [sum(z.reshape(T, -1)[:, i]) / (A * T) for i in range(y.size)]
    expected = sum((a - b) ** 2 for a, b in zip(e_s, e_t)) / y.size
    assert_close(S.rate_matching(z, y, T, V, A)[0], expected, 3e-3)
    assert S.rate_matching(A * fixed(np.concatenate([y > 0] * T)), 9 * y, T, 1e-9, A)[0] < 1e-20
    assert_gradient(at_every_step(S.rate_matching, y, T, V, A), z)

@checks(T=st.integers(1, 4), C=st.integers(1, 4), seed=SEED)
def rate_mapping_is_equation_12_up_to_a_linear_map(S, T=3, C=3, seed=0):
    z, y = normal(seed, (T * 2, 3, 4, C), (2, 3, 4, 5))
    V, A, ridge, n = 0.7, 1.3, 1e-3, 24
    rows = np.zeros((n + C, C + 1))  # of the ridge last, b in the last column
    rows[:n, :C], rows[:n, C] = (z.reshape(T, n, C).mean(0) / A), 1
    rows[n:, :C] = np.eye(C) * (n * ridge) ** 0.5
    goals = np.concatenate([np.clip(y.reshape(n, 5) / V, 0, 1), np.zeros((C, 5))])
    best = np.linalg.lstsq(rows, goals, rcond=None)[0]
    expected = ((rows @ best - goals) ** 2).sum() / n / 5
    assert_close(S.rate_mapping(z, y, T, V, A)[0], expected)
    assert_gradient(at_every_step(S.rate_mapping, y, T, V, A), z)
    hidden, turn = normal(seed + 1, (2, 3, 4, C), (C, C))  # what a map undoes is no error
    turned = np.concatenate([hidden @ (turn + 3 * np.eye(C))] * T)
    assert S.rate_mapping(turned, 0.5 + 0.01 * hidden, T, 1.0, A, 1e-9)[0] < 1e-9

@checks()
def layers_are_matched_by_name_or_else_by_resolution(S):
    maps = lambda **nets: {k: np.zeros((2, side, side, C)) for k, (side, C) in nets.items()}
    teacher = maps(a=(8, 3), b=(8, 3), c=(4, 6), d=(4, 6), e=(2, 9))
    for student, same, mapped in (
            (teacher, dict(zip("abcde", "abcde")), {}), (maps(a=(8, 3), x=(8, 3)), dict(a="a"), {}),
            (maps(u=(8, 3), v=(8, 4), w=(4, 5)), {}, dict(v="b", w="d")),
            (maps(a=(8, 4), b=(8, 4)), {}, dict(b="b")),
            (maps(a=(4, 3), x=(4, 6)), {}, dict(x="d")),
            (maps(a=(8, 3), c=(4, 5), d=(2, 9), x=(1, 9)), dict(a="a"), dict(c="d", d="e"))):
        assert S.matched_layers(student, teacher) == (same, mapped)

@checks(**B_K)
def distillation_is_equation_10(S, B=4, K=3, seed=0):
    t, s = normal(seed, (B, K), (B, K))
    for tau in (1, 4, 2.5):
        rows = zip(entropy_terms(t / tau), entropy_terms(s / tau))
        expected = tau ** 2 / B * sum(math.exp(u) * (u - v) for r in rows for u, v in zip(*r))
        assert_close(S.distillation_loss(t, s, tau)[0], expected, 1e-11)
        assert_gradient(lambda s: S.distillation_loss(t, s, tau), s)

TERMS = ("bn", "oh", "bal", "adv", "rca", "tar")

def pair_of(S, family, T=2):  # student and teacher agree on some of the images: Eq. (6) is not 0
    seed = {"projection": 34}.get(family, 1)
    return net_of(S, family, smooth), net_of(S, family, smooth_spikes(S, T), T, seed)

@checks()
def synthesis_parts_are_the_losses(S):
    for family, shift in (("option A", (0, 3)), ("vgg11", (2, 1))):
        (teacher, student), x = pair_of(S, family), images_of(family, 4)
        tail, labels = S.Tail(tau=0.3, shift=shift), np.array([0, 2, 1, 1])
        inputs, p, layers = {}, teacher.params, S.batch_norms(teacher.params)
        t, _ = S.forward(teacher, (x - teacher.mean) / teacher.std,
                         tap=inputs.__setitem__)
        s, _ = S.forward(student, (x - teacher.mean) / teacher.std)
        assert list(inputs) == layers
        vectors = {layer: [p[f"{layer}.{v}"] for v in ("weight", "running_mean", "running_var")]
                   for layer in layers}
        terms = []
        for layer, pi in zip(layers, tail.targets(len(layers), 3)):
            e = np.reshape(exceedances(inputs[layer], *vectors[layer], (1, 2, 3), 0.3), (-1, 3))
            terms.extend(((e - pi) ** 2 / (pi * (1 - pi))).ravel())
        expected = {"bn": sum(S.bn_matching(inputs[k], *v[1:])[0] for k, v in vectors.items()),
                    "oh": S.class_prior(t.logits, labels)[0], "bal": S.balance(t.logits)[0],
                    "adv": S.adversarial(t.logits, s.logits)[0], "tar": sum(terms) / len(terms),
                    "rca": S.rca(t.features, s.features)[0]}
        weights = S.Weights(2, 3, 5, 7, 11, 13)
        parts, _ = S.synthesis_loss(x, teacher, student, weights, labels, tail)
        for name in TERMS:
            assert_close(parts[name], expected[name], 1e-10)
        assert_close(parts["total"],
                     sum(w * expected[k] for k, w in zip(TERMS, (2, 3, 5, 7, 11, 13))))
        for name in TERMS:  # without its weight a layer loss is not computed, nor is the student
            parts, _ = S.synthesis_loss(x, teacher, None, S.Weights(
                **dict.fromkeys(TERMS, 0) | {name: 0 if name in ("adv", "rca") else 1}))
            assert all(parts[k] == 0 for k in ("bn", "adv", "rca", "tar") if k != name)

@checks()
def synthesis_gradient_to_the_pixels(S):
    for family in FAMILIES:
        (teacher, student), x = pair_of(S, family), images_of(family, 4)
        assert S.synthesis_loss(x, teacher, student)[0]["adv"] < 0
        for weights, labels in (
                (S.Weights(), None), (S.Weights(), [0, 2, 1, 1]),
                *((S.Weights(**dict.fromkeys(TERMS, 0) | {name: 1}), None)
                  for name in TERMS if family == "option A")):
            def f(x):
                parts, dx = S.synthesis_loss(x, teacher, student, weights, labels)
                return parts["total"], lambda d: d * dx
            assert_gradient(f, x, tol=1e-6)

@checks()
def synthesis_gradient_at_real_spikes(S):
    teacher, x = net_of(S, "option A", smooth), images_of("option A", 4)
    for detach in (True, False):
        neuron = S.Neuron(0.8, "soft", 0.4, "atan", detach)
        frozen = FrozenSpikes(S, 3, neuron, 0.8, 1.3)
        student = net_of(S, "option A", frozen, 3, seed=1)
        weights = S.Weights(0, 0, 0, 1, 10, 0)
        def f(x):
            frozen.again()
            parts, dx = S.synthesis_loss(x, teacher, student, weights)
            return parts["total"], lambda d: d * dx
        if detach:  # the derivative of the frozen network follows the reset: another gradient
            assert min(gradient_errors(f, [x])) > 1e-4
        else:
            assert_gradient(f, x, tol=1e-6)

def synthesis_gradient_to_the_generator(family, classes):
    @checks(f"synthesis_gradient_to_the_generator_{family}_{classes}")
    def check(S):
        (teacher, student), size = pair_of(S, family), FAMILIES[family][1]
        seed = 6 if family == "vgg11" else 5  # no pool near a tie
        params, z, labels = generator_case(S, size, classes, seed=seed)
        offsets, flips = S.draw_augmentation(np.random.default_rng(3), len(z), 2)
        def f(*values):
            images, back = S.generator(dict(zip(params, values)), z, activation=smooth)
            images, augment_back = S.augment(images, offsets, flips, 2)
            parts, dx = S.synthesis_loss(images, teacher, student, labels=labels)
            assert parts["adv"] < 0
            def both(d):
                grads = back(d * augment_back(dx))[1]
                return [grads[name] for name in params]
            return parts["total"], both
        assert_gradient(f, *params.values(), tol=1e-6)

for _family, _classes in zip(FAMILIES, (0, 3, 0, 3)):
    synthesis_gradient_to_the_generator(_family, _classes)

def distillation_gradient(family, of=None):
    """Eq. (10) with (7) and (12) in it: what a first step of SGD moves the weights by, lr = 1."""
    @checks(f"distillation_gradient_{family}" + (f" of {of}" if of else ""))
    def check(S):
        (teacher, _), x = pair_of(S, of or family), images_of(of or family, 4)
        student = pair_of(S, family)[1]
        names, layers = trainable(student.params), S.batch_norms(teacher.params)
        V = {layer: 0.5 + 0.1 * i for i, layer in enumerate(layers[1:]) if "shortcut" not in layer}
        V["none"] = 1.0  # the mean of Eq. (12) is over layers that both have and have a V
        def f(*values):
            new = {**student.params, **{name: v.copy() for name, v in zip(names, values)}}
            loss = S.distillation_step(student._replace(params=new), {}, x, teacher, 4., 1., 0., 3.,
                                       20., V)
            assert loss["rate"] > 0.005
            moved = [(v - new[name]) / 1.9 for name, v in zip(names, values)]
            return loss["total"], lambda d: [d * v for v in moved]
        assert_gradient(f, *(student.params[name] for name in names), tol=1e-6)

@checks()
def other_layers_are_mapped_and_the_same_are_not(S):
    """Names, shapes, thresholds and amplitudes of Eq. (12) in a step; another width is mapped."""
    for family, of, width in (("option A", "option A", 2), ("option A", "option A", 5),
                              ("projection", "vgg11", 2), ("vgg11", "vgg11", 3)):
        shapes = S.weight_shapes(*FAMILIES[family][0][:2], width, *FAMILIES[family][0][3:])
        teacher, x = pair_of(S, of)[0], images_of(of, 4)
        params = weights_of(S, shapes, 1)
        params |= {layer + ".amplitude": 1.3 for layer in S.batch_norms(params)}
        student, outputs, fired = teacher._replace(
            params=params, activation=S.Neuron(), T=2), {}, {}
        V = {layer: 0.5 + 0.1 * i for i, layer in enumerate(S.batch_norms(teacher.params))}
        normal = (x - np.array(teacher.mean)) / teacher.std
        S.forward(teacher, normal, watch=outputs.__setitem__)
        S.forward(student, normal, train=True, watch=fired.__setitem__)
        losses = [(S.rate_matching if k == its and width == 2 else S.rate_mapping)(
            fired[k], outputs[its], 2, V[its], 1.3)[0]
            for pairs in S.matched_layers(fired, outputs) for k, its in pairs.items()]
        student = student._replace(params={k: v + 0.0 for k, v in params.items()})
        loss = S.distillation_step(student, {}, x, teacher, 4., 1., 0., 3., 20., V)
        assert_close(loss["rate"], np.mean(losses))
        assert 0 < loss["rca"] and loss["total"] == loss["kd"] + 3 * loss["rca"] + 20 * loss["rate"]
        one = S.distillation_step(student, {}, x[:1], teacher, 4., 1., 0., 0., 0., V)
        assert one["rca"] == one["rate"] == 0 and one["total"] == one["kd"] > 0

for _family, _of in [*zip(FAMILIES, itertools.repeat(None)), ("projection", "vgg11")]:
    distillation_gradient(_family, _of)

# ---- 6  Optimisers -------------------------------------------------------------------------------

OPTIONS = dict(lr=st.floats(0.01, 1), momentum=st.floats(0, 0.99), nesterov=st.booleans(),
               decay=st.sampled_from((0.0, 0.1)), seed=SEED)

@checks(**OPTIONS)
def sgd_is_its_formula(S, lr=0.1, momentum=0.8, nesterov=True, decay=0.1, seed=0):
    w, *grads = normal(seed, (2, 3), (2, 3), (2, 3), (2, 3))
    params, state = {"w": w.copy(), "other": np.ones(2)}, {}
    updated, expected, velocity = params["w"], w.copy(), None
    for g in grads:
        S.sgd(params, {"w": g}, state, lr, momentum, nesterov, decay)
        for i in np.ndindex(2, 3):
            whole = g[i] + decay * expected[i]
            if velocity is None or i not in velocity:
                velocity = {**(velocity or {}), i: whole}
            else:
                velocity[i] = momentum * velocity[i] + whole
            expected[i] -= lr * (whole + momentum * velocity[i] if nesterov else velocity[i])
        assert_close(params["w"], expected)
    assert params["w"] is updated and params["other"].tolist() == [1, 1]

@checks(lr=st.floats(1e-3, 1), beta=st.floats(0, 0.99), seed=SEED)
def adam_is_its_formula(S, lr=0.1, beta=0.5, seed=0):
    w, *grads = normal(seed, (2, 3), (2, 3), (2, 3), (2, 3))
    params, state, expected = {"w": w.copy()}, {}, w.copy()
    updated, m, v = params["w"], np.zeros((2, 3)), np.zeros((2, 3))
    for t, g in enumerate(grads, 1):
        S.adam(params, {"w": g}, state, lr, (beta, 0.99), 1e-3)
        for i in np.ndindex(2, 3):
            m[i] = beta * m[i] + (1 - beta) * g[i]
            v[i] = 0.99 * v[i] + 0.01 * g[i] ** 2
            expected[i] -= lr * (m[i] / (1 - beta ** t)) / (
                math.sqrt(v[i] / (1 - 0.99 ** t)) + 1e-3)
        assert_close(params["w"], expected, 1e-10)
    assert params["w"] is updated

@checks()
def cosine_schedule_is_its_formula(S):
    rates = [S.cosine(step, 10, 0.8, 4) for step in range(11)]
    assert_close(rates[:5], [0.2, 0.4, 0.6, 0.8, 0.8])
    assert_close(rates[4:], [0.4 * (1 + math.cos(math.pi * i / 6)) for i in range(7)])
    assert rates[10] == 0 and S.cosine(0, 10, 0.8) == 0.8 and S.cosine(0, 0, 0.8) == 0.8

# ---- 7  Arguments, devices, imports --------------------------------------------------------------

def test_published_numbers_of_weights():
    count = lambda *args: sum(math.prod(shape) for name, shape in
                              stars.weight_shapes(*args).items() if "running" not in name)
    assert count("resnet20", 10) == 269722 and count("resnet56", 10) == 853018
    assert count("resnet18", 10) == 11173962
    convs = [name for name in stars.weight_shapes("vgg16", 10) if name.endswith("weight")]
    assert [int(name.split(".")[1]) for name in convs[:-1:2]] == [
        0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]  # the convolutions of vgg16_bn

def test_batch_norms_are_listed_from_input_to_output():
    norms = stars.batch_norms(dict.fromkeys(reversed([*stars.weight_shapes("vgg11", 10)])))
    assert norms == [f"features.{i}" for i in (1, 5, 9, 12, 16, 19, 23, 26)]
    norms = stars.batch_norms(stars.weight_shapes("resnet8", 10, projection=True))
    assert norms[:4] == ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1"]

def test_initial_weights():
    rng = np.random.default_rng(0)
    p = stars.init_weights(stars.weight_shapes("resnet8", 10), rng)
    w = p["layer3.0.conv2.weight"]
    assert abs(w.std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.02 and abs(w.mean()) < 1e-3
    assert {v.dtype for v in p.values()} == {np.dtype("float32")}
    assert {float(v) for v in p["bn1.running_var"]} == {1} == {float(v) for v in p["bn1.weight"]}
    assert not p["bn1.running_mean"].any() and not p["bn1.bias"].any()
    assert 0.11 < abs(p["linear.weight"]).max() <= 1 / 8 >= abs(p["linear.bias"]).max() > 0
    p = stars.init_weights(stars.generator_shapes(32, 16, 25), rng)
    assert 0.19 < abs(p["fc.weight"]).max() <= 0.2 and 0.19 < abs(p["fc.bias"]).max() <= 0.2
    assert abs(p["conv1.weight"]).max() <= 1 / 12 and abs(p["conv3.bias"]).max() <= 72 ** -0.5

def test_augmentations_are_drawn_from_the_whole_range():
    offsets, flips = stars.draw_augmentation(np.random.default_rng(0), 1000, 2)
    assert np.unique(offsets).tolist() == [0, 1, 2, 3, 4] and offsets.shape == (1000, 2)
    assert flips.dtype == bool and 400 < flips.sum() < 600

A4, A2, V3 = np.ones((2, 4, 4, 3)), np.ones((2, 3)), np.ones(3)  # also in float32
TEACHER = stars.Net(stars.init_weights(stars.weight_shapes("resnet8", 3, 2),
                                       np.random.default_rng(0)))
BAD = [  # what the sentence names, the call
    ("beta", lambda: stars.norm_activation(A4, V3, np.ones(4), V3, V3)),
    ("T", lambda: stars.norm_activation(A4, V3, V3, V3, V3, stars.Neuron(), 0)),
    ("x", lambda: stars.conv2d(A4[0], np.ones((1, 3, 3, 3)))),
    ("w", lambda: stars.conv2d(A4, np.ones((1, 2, 3, 3)))),
    ("w", lambda: stars.conv2d(A4, np.ones((1, 3, 2, 3)))),
    ("w", lambda: stars.conv2d(A4, np.ones((1, 3, 3, 4)))),
    ("w", lambda: stars.conv2d(A4, np.ones((3, 3)))),
    ("stride", lambda: stars.conv2d(A4, np.ones((1, 3, 3, 3)), 3)),
    ("gamma", lambda: stars.batch_norm(A4, np.ones(4), V3, V3, V3)),
    ("x", lambda: stars.batch_norm(A2[:1], V3, V3, V3, V3, train=True)),
    ("x", lambda: stars.max_pool(A4[:, 1:])),
    ("channels", lambda: stars.shortcut_a(A4, 2)),
    ("T", lambda: stars.mean_over_time(A2, 3)),
    ("reset", lambda: stars.Neuron(reset="none")),
    ("surrogate", lambda: stars.Neuron(surrogate="relu")),
    ("lam", lambda: stars.Neuron(1.1)), ("lam", lambda: stars.Neuron(float("nan"))),
    ("T", lambda: stars.lif(A2, 3)), ("T", lambda: stars.lif(A2, 0)),
    ("v_th", lambda: stars.lif(A2, 2, 0)),
    ("x", lambda: stars.forward(TEACHER, A2)), ("x", lambda: stars.forward(TEACHER, A4[..., :2])),
    ("beta", lambda: stars.batch_norm(A4, V3, np.ones(2), V3, V3)),
    ("offsets", lambda: stars.augment(A4, [[0, 0], [9, 0]], [True, False])),
    ("s", lambda: stars.adversarial(A2, A2[:1])),
    ("labels", lambda: stars.class_prior(A2, [0, 3])),
    ("labels", lambda: stars.class_prior(A2, [[0], [1]])),
    ("read-only", lambda: stars.Tail().targets(2, 3).fill(0)),
    ("f_t", lambda: stars.rca(A2[:1], A2[:1])), ("f_s", lambda: stars.rca(A2, A2[:1])),
    ("y", lambda: stars.rate_matching(A4, A4, 2, 1.0)),
    ("y", lambda: stars.rate_mapping(A4, A4, 2, 1.0)),
    ("T", lambda: stars.rate_matching(A4, A4, 3, 1.0)),
    ("pi", lambda: stars.tar(A2, V3, V3, V3, (0.1,))),
    ("gamma", lambda: stars.norm_activation(A4, np.ones(2), V3, V3, V3)),
    ("T", lambda: stars.norm_activation(A4, V3, V3, V3, V3, stars.Neuron(), 3)),
    ("v_th", lambda: stars.norm_activation(A4, V3, V3, V3, V3, stars.Neuron(), 2, -1)),
    ("x", lambda: stars.norm_activation(A2[:1], V3, V3, V3, V3, train=True)),
    ("x", lambda: stars.synthesis_loss(A2, TEACHER, TEACHER)),
    ("x", lambda: stars.synthesis_loss(A4[..., :1], TEACHER, TEACHER)),
    ("student", lambda: stars.synthesis_loss(A4, TEACHER)),
    ("student", lambda: stars.synthesis_loss(A4, TEACHER, TEACHER._replace(mean=(0, 0, 0)))),
    ("student", lambda: stars.distillation_step(TEACHER._replace(std=(1, 1, 1)), {}, A4, TEACHER,
                                                4, 0.1, 0, 0, 0, {})),
    ("s", lambda: stars.distillation_loss(A2, A2[:1])),
    ("arch", lambda: stars.weight_shapes("resnet21", 10)),
    ("size", lambda: stars.generator_shapes(30)),
    ("x", lambda: stars.predict(TEACHER, A4)),
    ("y", lambda: stars.evaluate(TEACHER, np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 1)))),
    ("device", lambda: stars.use_device("tpu"))]

@pytest.mark.parametrize("dtype", ("f8", "f4"))
@pytest.mark.parametrize("i", range(len(BAD)))
def test_a_bad_argument_is_named(i, dtype, monkeypatch):
    for name in ("A4", "A2", "V3"):
        monkeypatch.setitem(globals(), name, globals()[name].astype(dtype))
    with pytest.raises(ValueError) as error:
        BAD[i][1]()
    sentence = str(error.value)
    assert f" {BAD[i][0]} " in f" {sentence.replace(':', ' ')} " and "\n" not in sentence

def fake_cupy(monkeypatch, arange=np.arange):
    module = types.SimpleNamespace(arange=arange, float32=np.float32)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module

def test_the_gpu_is_taken_only_where_a_kernel_runs(monkeypatch):
    module = fake_cupy(monkeypatch)
    monkeypatch.setenv("CUPY_TF32", "0")
    assert stars.use_device("auto", True) == "gpu" and stars.xp is module
    assert (stars.TF32, os.environ["CUPY_TF32"]) == (1, "1")
    assert stars.use_device() == "gpu" and (stars.TF32, os.environ["CUPY_TF32"]) == (0, "0")
    assert stars.use_device("cpu") == "cpu" and stars.xp is np

@pytest.mark.parametrize("installed", (False, True))
def test_no_gpu_is_one_sentence(monkeypatch, installed):
    def broken(*_, **__):
        raise OSError("no driver")
    fake_cupy(monkeypatch, broken)
    if not installed:
        monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match="no usable GPU") as error:
        stars.use_device("gpu")
    assert "\n" not in str(error.value) and error.value.__suppress_context__
    assert stars.use_device("auto") == "cpu" and stars.xp is np

def test_to_host():
    on_device = types.SimpleNamespace(get=lambda: np.ones(2))
    assert stars.to_host(on_device).tolist() == [1, 1] == stars.to_host([1, 1]).tolist()

def fresh_copy():
    spec = importlib.util.spec_from_file_location("stars_again", stars.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.mark.parametrize("given", ({}, {"OPENBLAS_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "3"}))
def test_importing_leaves_the_environment_as_it_was(monkeypatch, given):
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert fresh_copy().xp is np and dict(os.environ) == before
    script = ("import os; before = dict(os.environ); import stars; "
              "raise SystemExit(dict(os.environ) != before)")
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(stars.__file__).parent
                          ).returncode == 0

def test_without_numpy_it_ends_in_one_sentence(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(SystemExit, match="pip install numpy"):
        fresh_copy()

# ---- 8  Mutants ----------------------------------------------------------------------------------

SPEC = SOURCE[:SOURCE.index("# ---- 7  ")]  # sections 0 to 6
PROCEDURES = SOURCE[SOURCE.index("# ---- 9  "):SOURCE.index("# ---- 10  ")]
FAST = SOURCE[SOURCE.index("# ---- 12  "):]

def mutant(tree_or_source):
    module = types.ModuleType("mutant")
    exec(compile(tree_or_source, "mutant", "exec"), module.__dict__)
    return module

def killed_by(module, names):
    """The first of the checks that the module fails, or None."""
    for name in names:
        try:
            with np.errstate(all="ignore"):
                CHECKS[name](module)
        except Exception:  # a wrong number, a wrong shape: whatever a check says
            return name
    return None

def at_equation(number, old, new):
    """The source with old replaced on the one line of code that carries `# Eq. (number)`."""
    lines = SOURCE.split("\n")
    hits = [i for i, line in enumerate(lines)
            if line.rstrip().endswith(f"  # Eq. ({number})") and old in line]
    assert len(hits) == 1, f"Eq. ({number}) stands on {len(hits)} lines with {old}"
    lines[hits[0]] = lines[hits[0]].replace(old, new, 1)
    return "\n".join(lines)

EQUATIONS = {  # number: (checks, mutant of the line)
    1: ("lif_is_equation_1", ("drive[t]", "drive[t - 1]")),
    2: ("lif_gradient_at_real_spikes", (") / V) / V", ") / V)")),
    3: ("bn_matching_is_equation_3", ("norm_mean + norm_var", "norm_mean - norm_var")),
    4: ("class_prior_is_equation_4", ("-(one_hot * log_p)", "(one_hot * log_p)")),
    5: ("balance_is_equation_5", ("(p * log_p).sum()", "log_p.mean()")),
    6: ("adversarial_is_equation_6", ("/ len(t)", "/ mask.sum()")),
    7: ("rca_is_equation_7", ("(B * (B - 1))", "B ** 2")),
    8: ("tar_is_equation_8", ("(gap ** 2).sum() * weight", "abs(gap).sum() * weight")),
    9: ("synthesis_gradient_to_the_pixels", ("getattr(weights, k) * loss", "loss")),
    10: ("distillation_gradient_projection", ("w_rca * relations", "relations")),
    11: ("students_and_energy_are_their_simulation", ("in costs)", "in costs[:-1])")),
    12: ("rate_matching_is_equation_12", ("(gap * gap).mean(), back", "abs(gap).mean(), back"))}

@pytest.fixture(scope="module")
def score():
    kills = []
    yield kills
    if kills:
        CLOSING.append(f"mutants: {sum(kills)} of {len(kills)} killed")

@pytest.mark.parametrize("number", EQUATIONS)
def test_a_mutant_of_each_equation_is_killed(number, score):
    check, (old, new) = EQUATIONS[number]
    CHECKS[check](stars)
    score.append(killed_by(mutant(at_equation(number, old, new)), [check]) == check)
    assert score[-1]

MUTANTS = [  # (old, new, the check that kills it); old stands once in sections 2 to 6, or 9
    ("dy @ w[:, :, r, s]\n", "dy @ w[:, :, s, r]\n", "conv2d_gradient"),
    ("window(padded, r, s) @ w[:, :, r, s].T", "window(padded, r, s) @ w[:, :, R - 1 - r, s].T",
     "conv2d_is_a_direct_sum"),
    ("s:s + W:stride]", "s:s + W]", "conv2d_is_a_direct_sum"),
    ("dpadded[:, P:P + H, Q:Q + W]", "dpadded[:, Q:Q + H, P:P + W]", "conv2d_gradient"),
    ("(dbeta + normal * dgamma) / count", "normal * dgamma / count", "batch_norm_gradient"),
    ("(dbeta + normal * dgamma) / count", "dbeta / count", "batch_norm_gradient"),
    ("(count / (count - 1))", "1", "batch_norm_is_its_definition"),
    ("da = tap_back(da)", "tap_back(da)", "networks_skip_gradients_and_take_taps"),
    ("mask = x > 0\n    return xp.maximum", "mask = x >= 0\n    return xp.maximum",
     "relu_has_gradient_zero_at_zero"),
    ("mask = x > 0\n    return xp.where", "mask = x >= 0\n    return xp.where",
     "leaky_relu_has_its_slope_at_zero"),
    ("wins = open_ & (quarter == y)", "wins = quarter == y", "the_first_of_equals_wins_the_pool"),
    ("open_ &= ~wins", "open_ &= wins", "max_pool_is_its_definition"),
    ("(channels - C) // 2", "channels - C", "linear_operators_are_their_definitions"),
    ("(dy + dy.T) @ unit", "2 * dy @ unit", "cosine_matrix_is_its_definition"),
    ("(norm > 0) / xp.where(norm > 0, norm, 1)", "1 / norm",
     "cosines_with_a_zero_vector_are_zero_without_gradient"),
    ("dy - xp.exp(y) * dy.sum(1, keepdims=True)", "dy - xp.exp(y)",
     "nonlinear_operators_are_their_definitions"),
    ("x.reshape((T, -1) + x.shape[1:]).mean(0)",
     "x.reshape((-1, T) + x.shape[1:]).mean(1)", "linear_operators_are_their_definitions"),
    ("1 - xp.tanh(2 * x) ** 2", "1 - xp.tanh(x) ** 2",
     "surrogates_are_the_slopes_of_their_primitives"),
    ("(x >= 0).astype", "(x > 0).astype", "lif_spikes_at_its_threshold_and_not_below"),
    ("float(neuron.v_init) * V", "float(neuron.v_init)", "lif_is_equation_1"),
    ("E_AC * accumulates * T", "E_AC * accumulates", "students_and_energy_are_their_simulation"),
    ("dkept = lam * du", "dkept = du", "lif_gradient_at_real_spikes"),
    ("dkept * (1 - s) if hard", "dkept if hard", "lif_gradient_at_real_spikes"),
    ("ds - dkept * (u if hard else V)", "ds - dkept * u", "lif_gradient_at_real_spikes"),
    ("if not neuron.detach_reset:", "if False:", "lif_gradient_of_a_smooth_spike"),
    ("if not neuron.detach_reset:", "if True:", "lif_gradient_at_real_spikes"),
    ("ds = A * dz[t]", "ds = dz[t]", "lif_gradient_at_real_spikes"),
    ("slope((u - V) / V) / V", "slope(u - V) / V", "lif_gradient_at_real_spikes"),
    ("for t in reversed(range(T)):", "for t in range(T):", "lif_gradient_of_a_smooth_spike"),
    ("dx if dfeatures is None else dx + dfeatures", "dx", "network_gradient_option_A"),
    ("        dx += shortcut_back(dkept)\n", "", "network_gradient_option_A"),
    (" and block != \"layer1.0\"", "", "students_and_energy_are_their_simulation"),
    ("if first and T > 1 else identity(y)", "if first and T > 2 else identity(y)",
     "synthesis_gradient_to_the_pixels"),
    ("transpose(0, 2, 3, 1),\n", "transpose(0, 3, 2, 1),\n", "generator_is_its_layers"),
    ("dm + 2 * (a - m) * dv", "dm + 2 * a * dv", "bn_matching_is_equation_3"),
    ("gap_mean / xp.where(norm_mean > 0, norm_mean, 1)", "gap_mean / norm_mean",
     "a_norm_at_zero_has_gradient_zero"),
    ("-one_hot * (dloss / len(t))", "-one_hot * dloss", "class_prior_is_equation_4"),
    ("xp.maximum(p, xp.finfo(p.dtype).tiny)", "p", "balance_is_equation_5"),
    ("(t.argmax(1) == s.argmax(1)).astype(t.dtype)", "xp.ones(len(t))",
     "rows_that_disagree_are_masked_from_the_adversary"),
    ("(gap - kl)", "gap", "adversarial_is_equation_6"),
    (" * (1 - xp.eye(B, dtype=f_t.dtype))", "", "rca_leaves_out_dead_features_and_the_diagonal"),
    ("back_s(-dgap)", "back_s(dgap)", "rca_is_equation_7"),
    ("xp.sign(gamma) / xp.sqrt(var + eps)", "1 / xp.sqrt(var + eps)",
     "tar_looks_towards_firing_by_the_sign_of_gamma"),
    ("rate * (1 / float(amplitude))", "rate", "rate_matching_is_equation_12"),
    ("- xp.clip(y * (1 / v_th), 0, 1)", "- y * (1 / v_th)", "rate_matching_is_equation_12"),
    ("gap * (2 * dloss / (gap.size * T *", "gap * (2 * dloss / (gap.size *",
     "rate_matching_is_equation_12"),
    ("dz + repeat_over_time(each, T)[0]", "dz - repeat_over_time(each, T)[0]",
     "distillation_gradient_option_A"),
    ("Y - Y.mean(0)", "Y", "rate_mapping_is_equation_12_up_to_a_linear_map"),
    ("ridge * (P * P).sum() / P.shape[1]", "ridge * (P * P).mean()",
     "rate_mapping_is_equation_12_up_to_a_linear_map"),
    ("gap @ P.T * (2 * dloss / (gap.size * T *", "gap @ P.T * (2 * dloss / (gap.size *",
     "rate_mapping_is_equation_12_up_to_a_linear_map"),
    ("R - R.mean(0)", "R", "rate_mapping_is_equation_12_up_to_a_linear_map"),
    ("(rate, xp.clip(y * (1 / v_th), 0, 1))", "(rate, y * (1 / v_th))",
     "rate_mapping_is_equation_12_up_to_a_linear_map"),
    ("if n in theirs and n not in met", "if n in theirs",
     "layers_are_matched_by_name_or_else_by_resolution"),
    ("teacher[k].shape[1:] == student[k].shape[1:]", "teacher[k].shape[3] == student[k].shape[3]",
     "layers_are_matched_by_name_or_else_by_resolution"),
    ("rate_mapping if layer in mapped else", "rate_mapping if "
     "fired[layer].shape[1:] != outputs[its].shape[1:] else",
     "other_layers_are_mapped_and_the_same_are_not"),
    ("rate_mapping if layer in mapped else", "rate_mapping if True else",
     "other_layers_are_mapped_and_the_same_are_not"),
    ('student.params.get(layer + ".amplitude", 1.0)', "1.0",
     "other_layers_are_mapped_and_the_same_are_not"),
    ("sum(matches) / matched", "sum(matches)", "distillation_gradient_option_A"),
    ("(w_rate / matched)", "(w_rate / len(thresholds))",
     "distillation_gradient_option_A"),
    ("if run.measure and isinstance(run.activation, Neuron):", "if run.measure:",
     "students_and_energy_are_their_simulation"),
    ("run.watch and fires and run.watch", "run.watch and run.watch", "networks_are_watched"),
    ("(slope * (dloss / (tau * count)))", "(slope * (dloss / count))", "tar_is_equation_8"),
    ("(target * (1 - target) * gap.size", "(target * gap.size", "tar_is_equation_8"),
    ("share = gamma.size / channels", "share = 1 / len(layers)", "synthesis_parts_are_the_losses"),
    ("tau ** 2 * (p_t", "(p_t", "distillation_is_equation_10"),
    ("dloss * tau / len(t)", "dloss / len(t)", "distillation_is_equation_10"),
    ("w_rca * relations", "relations", "distillation_gradient_option_A"),
    ("back(w_rca)[1]", "back(w_rca)[0]", "distillation_gradient_option_A"),
    ("E_AC * accumulates", "E_MAC * accumulates", "students_and_energy_are_their_simulation"),
    ("g + momentum * v if nesterov else v", "v", "sgd_is_its_formula"),
    ("g = g + weight_decay * params[name]", "pass", "sgd_is_its_formula"),
    ("m / correct[0]", "m", "adam_is_its_formula"),
    ("(step + 1) / warm_up", "step / warm_up", "cosine_schedule_is_its_formula")]

FAST_MUTANTS = [  # as above, of section 12
    ("np.subtract(x1, x3, out", "np.add(x1, x3, out", "fast_conv2d_is_conv2d"),
    ("odd[:, 0], even[:, -1], odd[:, :, -1], even[:, :, -1] = 0, 0, 0, 0",
     "odd[:, 0], even[:, -1] = 0, 0", "fast_conv2d_is_conv2d"),
    ("m1 -= m2", "m1 += m2", "fast_conv2d_is_conv2d"),
    ("(plane, pixel, 3 * rows", "(plane, pixel, rows", "fast_conv2d_is_conv2d"),
    ("_kernel(w[:, :, ::-1, ::-1]", "_kernel(w[:, :, ::-1]", "fast_conv2d_is_conv2d"),
    ("(b + c) / 2 - d]", "(b + c) / 2 + d]", "fast_conv2d_is_conv2d"),
    ("into[:, :, :, r, s] += dwin", "into[:, :, :, r, s] = dwin", "fast_conv2d_is_conv2d"),
    ("np.zeros_like(dx), margins", "np.ones_like(dx), margins", "fast_conv2d_is_conv2d"),
    ("min(n, (k + 1) * chunk)", "(k + 1) * chunk", "parallel_covers_its_range_in_order"),
    ("square - mean ** 2,", "square,", "moments_are_mean_and_variance"),
    ("e = v[i:j] - row", "e = v[i:j]", "moments_are_mean_and_variance"),
    ("surrogate(u[t] * (1 / v_th) - 1)", "surrogate(u[t] - 1)",
     "fast_norm_activation_is_norm_activation"),
    ("carried *= lam", "carried *= 1", "fast_norm_activation_is_norm_activation"),
    ("if not activation.detach_reset:", "if False:", "fast_norm_activation_is_norm_activation"),
    ("dkept * (u[t] * (1 / v_th)) if hard", "dkept * u[t] if hard",
     "fast_norm_activation_is_norm_activation"),
    ("v[t % len(v), i:j]", "v[0, i:j]", "fast_norm_activation_is_norm_activation"),
    ("kept[t, i:j]", "kept[0, i:j]", "fast_norm_activation_is_norm_activation"),
    ("np.multiply(u >= v_th", "np.multiply(u >= 1", "fast_norm_activation_is_norm_activation"),
    ("lam * activation.v_init * v_th", "lam * activation.v_init",
     "fast_norm_activation_is_norm_activation"),
    ("dkept * (u[t] < v_th) if hard else dkept", "dkept",
     "fast_norm_activation_is_norm_activation"),
    ("amplitude / v_th, out=du[t]", "1 / v_th, out=du[t]",
     "fast_norm_activation_is_norm_activation"),
    ("du.sum(0)", "du.mean(0)", "fast_norm_activation_is_norm_activation"),
    ("k * (dgamma * inv * mean - dbeta)", "-k * dbeta", "fast_norm_activation_is_norm_activation"),
    ("np.where(norms > 0, norms, 1)", "norms",
     "fast_tap_of_statistics_that_match_has_gradient_zero"),
    ("np.sign(gamma) / width))", "1 / width + 0 * mean))", "fast_tap_is_bn_matching_and_tar"),
    ("+ tilt.sum(0)", "", "fast_tap_is_bn_matching_and_tar"),
    ("2 * dsums[1] / sd", "dsums[1] / sd", "fast_tap_is_bn_matching_and_tar"),
    ("- 2 * m * dv * sd * sd,", ",", "fast_tap_is_bn_matching_and_tar"),
    ("w_tar * share / d.size", "w_tar / d.size", "fast_tap_is_bn_matching_and_tar"),
    ("1 / (T * float(amplitude)), out", "1 / T, out", "fast_rate_matching_is_rate_matching"),
    ("gap.size * T * float", "gap.size * float", "fast_rate_matching_is_rate_matching"),
    *((old, new, "gpu_conv2d_is_conv2d") for old, new in (
        ("row < H * U && column", "column"), ("% R - R / 2", "% R"), ("row % U == 0 && c", "c"),
        ("p < pixels && q", "q"), ("k < end && j", "j"), ("k0 += 16, at", "k0 += 8, at"),
        ("copied();\n", "\n"), ("__syncthreads();\n", "\n"),
        ("copied();\n            __syncthreads();", "__syncthreads();\n            copied();"),
        ("cut(x - a[step][0][m][v], 0)", "0"), ("cut(x - b[step][0][j][v], 0)", "0"),
        ("float x = A[at][", "float x = A[0]["), ("(at ^ swap)", "at"),
        ("TF32 ? nearest(x) : cut(x, DW ? 0x", "TF32 ? cut(x, 0) : cut(x, DW ? 0x"),
        ("TF32 ? nearest(w[from]) : w[from]", "w[from]"), ("R + R - 1 - r", "R + r"),
        ("turned ? GROUP_K : GROUP", "GROUP"),
        ("GROUP * S * R) * GROUP", "GROUP * S * R)"),
        ("size_t(part) * rows", "part"), ("warp % X * (BN / X)", "0"), ("U=stride)", "U=1)"))),
    *((old, new, "kernels_are_their_operators") for old, new in (
        ("i / C] = sum[k]", "i / C] = sum[0]"),
        ("v = square - m * m", "v = square"), ("v * (count / (count - 1))", "v"),
        ("mean[c]) + beta", "mean[0]) + beta"), ("drive += shortcut", "drive -= shortcut"),
        ("(u >= V ? A : 0)", "(u >= V ? 1 : 0)"), ("slope = A * share", "slope = A"),
        ("HARD && m[t] >= V ? 0 : kept", "kept"), ("kept = lam * du;", "kept = du;"),
        ("DETACH ? 0", "1 ? 0"), ("kept * m[t] * share", "kept * m[t]"),
        ("if (FIRST) du = over_time", ""),
        ("TRAIN || SHORTCUT", "TRAIN"), ("da[at] = gamma[c] * inv * du", "da[at] = du"),
        ("i / C] = sum_y", "i / C] = sum"), ("sum += over_time;", "sum = over_time;"),
        ("sums[c] + y * sums[C + c]", "sums[c]"), ("2 * y * dsums", "y * dsums"),
        ("(1 - soft * soft)", "soft"), ("m[t] > 0 ? 1 :", "m[t] > 0 ? 0 :"),
        ("sum += z[size_t(t) * size + j]", "sum = z[j]"), ("square / size", "square"),
        ("EACH ? each[i] : 0", "0"), ("goal > 1 ? 1 : goal", "goal"),
        ("int c = k ? k - 1 : i", "int c = k ? k - 1 : 0"), ("- 2 * m * dsums", "- m * dsums"),
        ("mean_norm += k ?", "mean_norm +="), ("var_norm > 0 ? w_bn", "true ? w_bn"),
        ("w_bn != 0 ? mean_norm + var_norm : 0", "mean_norm + var_norm"), ("* K * C), d", "), d"),
        ("loss += d * d", "loss = d * d"), ("w_tar * share * d", "w_tar * d"),
        ("loss * share", "loss"),
        ("(g[i] * g[i] - v", "(g[i] - v"), ("sqrt(v[i] / correct2)", "sqrt(v[i])"),
        ("v[i] = momentum * v[i] + d", "v[i] = v[i] + d")))]

@pytest.mark.parametrize("i", range(len(MUTANTS) + len(FAST_MUTANTS)))
def test_a_mutant_is_killed(i, score):
    old, new, check = (MUTANTS + FAST_MUTANTS)[i]
    texts = (SPEC, PROCEDURES) if i < len(MUTANTS) else (FAST,)
    where = next(text for text in texts if old in text)
    assert where.count(old) == 1 and new != old
    before, part, after = SOURCE.partition(where)
    changed = before + part.replace(old, new) + after
    score.append(killed_by(mutant(changed), [check]) == check)
    assert score[-1]

def generated_mutants():
    """(what, tree): signs flipped and factors dropped in every `back` of sections 2 to 5."""
    lines = SOURCE.split("\n")
    first, last = (next(i for i, line in enumerate(lines, 1) if line.startswith(f"# ---- {n}  "))
                   for n in (2, 6))
    flipped, sites, tree = {ast.Add: ast.Sub, ast.Sub: ast.Add}, {}, ast.parse(SOURCE)
    for node in ast.walk(tree):
        named = isinstance(node, ast.FunctionDef) and node.name in ("back", "through")
        if (named or isinstance(node, ast.Lambda)) and first < node.lineno < last:
            for parent in ast.walk(node):
                for field, child in ast.iter_fields(parent):
                    for i, item in enumerate(child if isinstance(child, list) else [child]):
                        if isinstance(item, (ast.BinOp, ast.AugAssign, ast.UnaryOp)):
                            sites[id(item)] = parent, field, i, item
    for parent, field, i, item in sites.values():
        op, variants = type(item.op), []
        if op in flipped and "'" not in ast.unparse(item):  # names of parameters are no sums
            variants = [copy.copy(item)]
            variants[0].op = flipped[op]()
        elif op is ast.USub:
            variants = [item.operand]
        elif op in (ast.Mult, ast.Div) and isinstance(item, ast.BinOp):
            variants = [item.left, item.right][:1 + (op is ast.Mult)]
        child = getattr(parent, field)
        for variant in variants:
            new = [*child[:i], variant, *child[i + 1:]] if isinstance(child, list) else variant
            setattr(parent, field, new)
            yield f"{item.lineno}: {ast.unparse(item)} -> {ast.unparse(variant)}", tree
            setattr(parent, field, child)

@pytest.mark.skipif(not TORTURE, reason="make torture runs it")
def test_torture():
    assert killed_by(mutant(SOURCE), CHECKS) is None
    survivors, n, order = [], 0, list(CHECKS)
    for n, (what, code) in enumerate(generated_mutants(), 1):
        killer = killed_by(mutant(code), order)
        if killer:  # the next mutant is likely to be near this one
            order.insert(0, order.pop(order.index(killer)))
        else:
            survivors.append(what)
    CLOSING.append(f"generated mutants: {n - len(survivors)} of {n} killed; survivors, by line:")
    CLOSING.extend("  " + what for what in survivors)
    assert n > 100

# ---- 9  Fast paths, GPU parity -------------------------------------------------------------------

def leaves(tree):
    if not isinstance(tree, (dict, list, tuple)):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in leaves(child)]

def assert_same_norms(tree, other, tol=1e-3):
    for a, b in zip(leaves(tree), leaves(other), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.sqrt(((a - b) ** 2).sum()) <= tol * max(np.sqrt((a * a).sum()), 1e-6)

# Each fast path beside its plain operator, in float64; a chunk is 1, 2, 3 or the default of images

CHUNKS = (1, 2, 3, None)

def assert_all_close(ours, plain, tol=1e-11):
    for a, b in zip(leaves(ours), leaves(plain), strict=True):
        assert a is None is b or assert_close(a, b, tol) is None

@checks()
def fast_conv2d_is_conv2d(S):
    cases = [(5, 4, 4, 3, 2, 3, 3, 1), (4, 8, 5, 2, 7, 3, 3, 1), (7, 2, 3, 4, 4, 3, 3, 1),
             (4, 2, 1, 3, 4, 3, 3, 1), (5, 7, 6, 3, 2, 3, 3, 1), (5, 8, 8, 3, 4, 3, 3, 2),
             (4, 7, 9, 2, 3, 3, 3, 2), (5, 6, 6, 3, 4, 1, 1, 2), (5, 6, 5, 3, 4, 1, 1, 1),
             (3, 6, 6, 2, 3, 5, 5, 1), (3, 7, 8, 2, 3, 5, 5, 2), (4, 5, 6, 2, 3, 1, 5, 2),
             (2, 1, 1, 1, 1, 3, 3, 1), (3, 8, 20, 2, 64, 3, 3, 1)]  # the last in several blocks
    for i, (N, H, W, C, K, R, Q, stride) in enumerate(cases):
        x, w = normal(i, (N, H, W, C), (K, C, R, Q))
        y, back = S.conv2d(x, w, stride)
        dy = normal(i + 1, y.shape)
        dx, dw = back(dy)
        for chunk, need in itertools.product(CHUNKS, ("xp", "x", "p", "")):
            ours, ours_back = S.fast_conv2d(x, w, stride, need, chunk)
            assert_all_close([ours, ours_back(dy)],
                             [y, dx if "x" in need else None, dw if "p" in need else None])

def norm_cases(S):
    """(arguments of norm_activation from a on, chunk): activations, options, shortcuts."""
    chunk = itertools.cycle(CHUNKS)
    def case(seed, activation, T, train, shortcut, first=False, V=1.0, A=1.0):
        a, kept = normal(seed, (5 if first else 5 * T, 2, 3, 4), (5 * T, 2, 3, 4))
        gamma, beta, mean, var = batch_norm_case(seed, (4,))[1:]
        return (2 + 3 * a, gamma, beta, 2 + mean, 9 * var, activation, T, V, A, first,
                kept if shortcut else None, train), next(chunk)
    seeds, flags = itertools.count(), (False, True)
    for activation, train, shortcut in itertools.product(
            (S.relu, S.leaky_relu, S.identity), flags, flags):
        for _ in CHUNKS:
            yield case(next(seeds), activation, 1, train, shortcut)
    for (lam, v_init, V, A), T in (((0.5, 0.0, 1.0, 1.0), 3), ((0.9, 0.5, 0.7, 1.3), 4),
                                   ((1.0, 0.2, 1.5, 0.6), 1)):
        for neuron, train in itertools.product(neurons(S, lam, v_init), flags):
            for shortcut, first in ((False, False), (True, False), (False, True)):
                yield case(next(seeds), neuron, T, train, shortcut, first, V, A)

@checks()
def fast_norm_activation_is_norm_activation(S):
    rates = []
    for i, (args, chunk) in enumerate(norm_cases(S)):
        (z, running), back = S.norm_activation(*args)
        dz = normal(10000 + i, z.shape)
        each = dz[:5] if i % 2 else None
        grads = back(dz, each)
        (ours, our_running), our_back = S.fast_norm_activation(*args, chunk=chunk)
        if isinstance(args[5], S.Neuron):
            assert (ours == z).all()  # the same spikes
            rates.append((z != 0).mean())
        assert_all_close([ours, our_running, our_back(dz, each)],
                         [z, running, grads])
        if i % 4 == 0:
            only_x = S.fast_norm_activation(*args, need="", chunk=chunk)[1](dz, each)
            assert_all_close(only_x, [grads[0], None, None, grads[3]])
    assert 0.1 < np.mean(rates) < 0.7

@checks()
def fast_tap_is_bn_matching_and_tar(S):
    a, gamma, _, mean, var = map(np.array, batch_norm_case(0, (5, 2, 3, 6)))
    gamma[:3] = -1.5, 0, 0.5
    a[..., 3], mean[3], var[3] = 0.7, 0.7, 0  # a dead channel
    pi = (0.18, 0.03, 0.003)
    weights = ((1.0, 100.0), (0.7, 0.0), (0.0, 30.0), (0.0, 0.0))
    for (w_bn, w_tar), chunk in itertools.product(weights, CHUNKS):
        tail = S.Tail(kappa=(0.5, 1, 2), tau=0.4)
        losses, back = S.fast_tap(a, gamma, mean, var, pi, w_bn, w_tar / 0.7, 0.7, tail,
                                  chunk=chunk)
        bn, bn_back = S.bn_matching(a, mean, var)
        tar, tar_back = S.tar(a, gamma, mean, var, pi, tail.kappa, tail.tau)
        assert_all_close([*losses], [bn * (w_bn > 0), 0.7 * tar * (w_tar > 0)])
        da = back(np.ones_like(a)) - 1
        assert_close(da + 1, bn_back(w_bn) + tar_back(w_tar) + 1)
        assert w_bn == 0 or assert_close(da, bn_back(w_bn) + tar_back(w_tar), 1e-10) is None

@checks()
def fast_rate_matching_is_rate_matching(S):
    z, y = normal(0, (15, 2, 3, 4), (5, 2, 3, 4))
    z = 1.3 * (z > 0)
    loss, back = S.rate_matching(z, y, 3, 1.7, 1.3)
    for chunk in CHUNKS:
        ours, ours_back = S.fast_rate_matching(z, y, 3, 1.7, 1.3, chunk)
        assert_all_close([ours, ours_back(300.0)], [loss, back(300.0)])

@checks()
def fast_tap_of_statistics_that_match_has_gradient_zero(S):
    a, mean = np.full((4, 2, 2, 3), 0.5), np.full(3, 0.5)
    (bn, _), back = S.fast_tap(a, np.ones(3), mean, 0 * mean, (0.1,), 1.0, 0.0, 1.0,
                               S.Tail((1,)))
    assert bn == 0 and not back(np.zeros_like(a)).any()

@checks()
def moments_are_mean_and_variance(S):
    y = 3 + 2 * normal(0, (7, 3, 2, 5))
    for chunk in CHUNKS:
        assert_all_close(S.moments(y, chunk), [y.mean((0, 1, 2)), y.var((0, 1, 2))])
    single = (1000 + normal(0, (64, 8, 8, 3))).astype("f4")  # a mean of 1000 standard deviations
    (mean, var), exact = S.moments(single), single.astype("f8")
    assert_close(mean, exact.mean((0, 1, 2)), 1e-9)
    assert_close(var, exact.var((0, 1, 2)), 1e-6)

@checks()
def parallel_covers_its_range_in_order(S):
    for n, chunk in itertools.product((1, 2, 7, 9), (1, 2, 3, 10)):
        ranges = S.parallel(lambda i, j: (i, j), n, chunk)
        assert ranges == [(i, min(n, i + chunk)) for i in range(0, n, chunk)]
    with pytest.raises(ZeroDivisionError):
        S.parallel(lambda i, j: 1 / (i - 2), 4, 1)

def in_float32(a):
    return a.astype("f4") if isinstance(a, np.ndarray) else a

def test_what_a_worker_raises_is_raised(monkeypatch):
    monkeypatch.setattr(stars, "THREADS", 2)
    both = threading.Barrier(2)
    def fails_elsewhere(i, j):
        both.wait(20)
        return 1 / (threading.current_thread() is threading.main_thread())
    with pytest.raises(ZeroDivisionError):
        stars.parallel(fails_elsewhere, 2, 1)

def test_a_forked_process_computes():
    code = """import os, signal, stars
stars.THREADS = 2
compute = lambda: stars.parallel(lambda i, j: (os.getpid(), i), 8, 1)
compute()
child = os.fork()
assert [i for _, i in compute()] == [*range(8)]
if child:
    signal.alarm(20)
    assert os.waitpid(child, 0)[1] == 0
"""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    assert subprocess.run([sys.executable, "-c", code], timeout=60,
                          cwd=Path(stars.__file__).parent).returncode == 0

def test_float32_norm_activation_is_near_float64():
    for args, _ in norm_cases(stars):
        (z, running), back = stars.norm_activation(*args)
        (ours, our_running), our_back = stars.norm_activation(*map(in_float32, args))
        dz = normal(10000, z.shape)
        pairs = [(ours, z), *zip(our_running, running), *zip(our_back(in_float32(dz)), back(dz))]
        for low, high in pairs:
            if high is not None:
                assert low.dtype == "f4"
                assert_close(low, high, 1e-4)

@pytest.mark.parametrize("family", FAMILIES)
def test_float32_on_the_cpu_computes_the_definitions(family, monkeypatch):
    def single(net):
        return net._replace(params={k: v.astype("f4") for k, v in net.params.items()})
    teacher = single(net_of(stars, family, stars.relu))
    student = single(net_of(stars, family, stars.Neuron(0.8, "soft", 0.5), 3, seed=1))
    x = images_of(family, 4).astype("f4")
    def steps():
        parts, dx = stars.synthesis_loss(x, teacher, student)
        out, back = stars.forward(student, x, train=True)
        loss, loss_back = stars.distillation_loss(np.eye(4, 3, dtype="f4"), out.logits)
        return [parts, dx, loss, out.running, back(loss_back())]
    fast = steps()
    monkeypatch.setattr(stars, "fast", lambda x: False)
    assert_same_norms(steps(), fast)

# The kernels of the GPU, compiled as C++ and run thread after thread: numpy in place of cupy

@functools.lru_cache(None)
def kernel_folder():
    folder = tempfile.TemporaryDirectory()
    return Path(folder.name), folder

# What C++ lacks of CUDA. The threads of a block are coroutines: each runs up to the next barrier, a
# copy lands at once (early) or no sooner than its thread waits for it, and a product on tensor
# cores, of operands of all threads of a warp, is a barrier. An operand that is not TF32 gives NaN,
# a wild copy too.
EMULATION = """
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>
#define NAN __builtin_nanf("")  // <cmath> would take longer than all the rest
template <class T> T tanh(T x) { return __builtin_tanh(x); }
template <class T> T fabs(T x) { return __builtin_fabs(x); }
template <class T> T sqrt(T x) { return __builtin_sqrt(x); }
template <class T> T rsqrt(T x) { return 1 / sqrt(x); }
struct float2 { float x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
static struct { int x; } blockIdx, blockDim, threadIdx;
#define __global__
#define __shared__ static
static jmp_buf scheduler;
static struct {
    ucontext_t context;  // where it begins; to switch to one takes a system call
    jmp_buf at;          // where it goes on
    char stack[1 << 16];
    bool begun, ended;
    int copies;
    struct { float* to; const void* from; int bytes; bool inside; } copy[64];
    float operands[6];
} threads[1024];
static void __syncthreads() {
    if (!_setjmp(threads[threadIdx.x].at)) _longjmp(scheduler, 1);
}
static void go_on() {  // until the next barrier, or the end
    auto& mine = threads[threadIdx.x];
    if (_setjmp(scheduler)) return;
    if (mine.begun) _longjmp(mine.at, 1);
    mine.begun = true;
    setcontext(&mine.context);
}
static unsigned bits(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static float cut(float x, unsigned half) {
    unsigned y = (bits(x) + half) & 0xffffe000;
    memcpy(&x, &y, 4);
    return x;
}
static float nearest(float x) { return cut(x, __builtin_isfinite(x) ? 0x1000 : 0); }
static void mma(float* d, const float* a, const float* b) {
    int t = threadIdx.x, lane = t % 32, warp = t - lane;
    for (int v = 0; v < 6; v++) {
        float x = v < 4 ? a[v] : b[v - 4];
        threads[t].operands[v] = bits(x) % 0x2000 ? NAN : x;
    }
    __syncthreads();
    for (int v = 0; v < 4; v++) {
        int row = lane / 4 + v / 2 * 8, column = lane % 4 * 2 + v % 2;
        for (int k = 0; k < 8; k++)
            d[v] += threads[warp + row % 8 * 4 + k % 4].operands[row / 8 + k / 4 * 2] *
                    threads[warp + column * 4 + k % 4].operands[4 + k / 4];
    }
    __syncthreads();
}
static void copied() {
    auto& mine = threads[threadIdx.x];
    for (auto* c = mine.copy; c < mine.copy + mine.copies; c++)
        c->inside ? memcpy(c->to, c->from, c->bytes) : memset(c->to, 0, c->bytes);
    mine.copies = 0;
}
extern "C" const char* ranges[2][16] = {};  // where each array begins and ends
extern "C" bool early = false;
template <int n> static void copy(float* to, const void* from, bool inside) {
    auto& mine = threads[threadIdx.x];
    static const float nan[4] = {NAN, NAN, NAN, NAN};
    bool known = !inside;
    for (int i = 0; i < 16; i++) known |= from >= ranges[0][i] && from < ranges[1][i];
    if (mine.copies < 64) mine.copy[mine.copies++] = {to, known ? from : nan, 4 * n, inside};
    if (early) copied();
}
template <class F> static F* body;
template <class F> static void thread() {
    (*body<F>)();
    threads[threadIdx.x].ended = true;
    _longjmp(scheduler, 1);
}
template <class F> static void block(F f, bool barriers) {
    int& t = threadIdx.x;
    body<F> = &f;
    for (bool begin = true, on = true; on; begin = false)
        for (on = t = 0; t < blockDim.x; t++) {
            auto& mine = threads[t];
            if (!barriers) { f(); continue; }
            if (begin) {
                mine.begun = mine.ended = mine.copies = 0;
                getcontext(&mine.context);
                mine.context.uc_stack.ss_sp = mine.stack;
                mine.context.uc_stack.ss_size = sizeof mine.stack;
                makecontext(&mine.context, thread<F>, 0);
            }
            if (!mine.ended) go_on(), on = true;
        }
}
"""

NUMBER = re.compile(r"#define (?!(?:BN|DW|M|THREADS|VA|VB|X) )(\w+) (-?\d+(?:\.\d+)?)\n")

def without_numbers(code):
    """Code of a kernel, and {name: number} of what is no size of a static array and no argument
    of a template, so need not be compiled in: one library serves them all."""
    code = code.replace(stars.DEVICE, "")
    return NUMBER.sub("", code), {name: json.loads(v) for name, v in NUMBER.findall(code)}

class Kernel:
    """What cupy.RawKernel is to stars.py, on the CPU."""
    early = False

    def __init__(self, code, name):
        arguments = re.search(rf"void {name}\(int n, (.*)\) {{", code)[1]
        names = ", ".join(argument.split()[-1] for argument in arguments.split(", "))
        code, numbers = without_numbers(code)
        self.numbers = {k: (v, "double" if isinstance(v, float) else "int")
                        for k, v in numbers.items()}
        told = "".join(f'extern "C" {{ {kind} {k}; }}\n' for k, (_, kind) in self.numbers.items())
        code = told + code
        path = kernel_folder()[0] / hashlib.sha256(code.encode()).hexdigest()[:16]
        if not path.exists():
            if shutil.which("g++") is None:
                pytest.skip("no g++ here")
            source = f"""{EMULATION}
                {code}
                extern "C" void run(int blocks, int threads, int n, {arguments}) {{
                    blockDim.x = threads;
                    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
                        block([&] {{ {name}(n, {names}); }}, {str("mma(" in code).lower()});
                }}"""
            subprocess.run(["g++", "-w", "-O1", "-U_FORTIFY_SOURCE",  # it forbids to switch stacks
                            "-shared", "-fPIC", "-x", "c++", "-", "-o", path],
                           input=source, text=True, check=True)
        self.library = ctypes.CDLL(str(path))

    def __call__(self, grid, block, arguments):
        numbers = {"f": ctypes.c_float, "d": ctypes.c_double, "i": ctypes.c_int}
        assert all(a.flags.c_contiguous for a in arguments if a.ndim)
        assert len({a.dtype for a in arguments if a.dtype.kind == "f"}) == 1
        ctypes.c_bool.in_dll(self.library, "early").value = Kernel.early
        for name, (number, kind) in self.numbers.items():
            getattr(ctypes, "c_" + kind).in_dll(self.library, name).value = number
        ranges = (ctypes.c_size_t * 32).in_dll(self.library, "ranges")
        for i, a in enumerate(a for a in arguments if a.ndim):
            ranges[i], ranges[16 + i] = a.ctypes.data, a.ctypes.data + a.nbytes
        self.library.run(*grid, *block, *(a.ctypes.data_as(ctypes.c_void_p) if a.ndim else
                                          numbers[a.dtype.char](a) for a in arguments))

@contextlib.contextmanager
def emulated_gpu(S):
    device = types.SimpleNamespace(compute_capability="90")
    S.xp = types.SimpleNamespace(**vars(np) | dict(
        RawKernel=Kernel, cuda=types.SimpleNamespace(Device=lambda: device)))
    S._compiled.cache_clear()  # of kernels for a GPU, if there is one
    address, S.gpu_address = S.gpu_address, lambda a: a.ctypes.data
    try:
        yield
    finally:
        S.xp, S.gpu_address = np, address
        S._compiled.cache_clear()

def kernel_cases(S):
    """(name, plain, ours, arrays): functions of arrays -> list of arrays, on the CPU and a GPU."""
    def both(result, of=lambda value: value):  # the value, and the gradients of a projection of it
        value, back = result
        y = of(value)
        dy = S.xp.sin(S.xp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        grads = back(dy)
        return [*(value if isinstance(value, tuple) else [value]), *grads]
    for i, (args, _) in enumerate(norm_cases(S)):
        if i % 5 == 0:
            vectors, (activation, T, V, A, first, shortcut, train) = args[:5], args[5:]
            def norm(f, *arrays, options=(activation, T, V, A, first), train=train, odd=i % 2):
                kept = arrays[5] if len(arrays) > 5 else None
                with pytest.MonkeyPatch.context() as patch:  # so few that each has several numbers
                    patch.setattr(S, "GPU_THREADS", 9)
                    (z, running), back = f(*arrays[:5], *options, kept, train)
                    others = f(*arrays[:5], *options, kept, train, "")[1]
                    each = lambda dz: dz[:5] if odd else None
                    return both(((z, *running),
                                 lambda dz: back(dz, each(dz)) + others(dz, each(dz))[::3]),
                                lambda value: value[0])
            yield (f"norm {i}", functools.partial(norm, S.norm_activation),
                   functools.partial(norm, S.gpu_norm_activation),
                   vectors + (() if shortcut is None else (shortcut,)))
    a, gamma, _, mean, var = map(np.array, batch_norm_case(0, (5, 2, 3, 6)))
    gamma[:3] = -1.5, 0, 0.5
    a[..., 3], mean[3], var[3] = 0.7, 0.7, 0  # a dead channel
    pi = (0.18, 0.03, 0.003)
    still = np.full((4, 2, 2, 2), 0.5), np.ones(2), np.full(2, 0.5), np.zeros(2)
    for w_bn, w_tar in ((1.0, 100.0), (0.7, 0.0), (0.0, 30.0)):
        def plain(a, gamma, mean, var, w_bn=w_bn, w_tar=w_tar):
            bn, bn_back = S.bn_matching(a, mean, var)
            exceed, tar_back = S.tar(a, gamma, mean, var, pi)
            return [bn * (w_bn > 0), 0.7 * exceed * (w_tar > 0), bn_back(w_bn) + tar_back(w_tar)]
        def ours(a, gamma, mean, var, w_bn=w_bn, w_tar=w_tar):
            losses, back = S.fast_tap(a, gamma, mean, var, pi, w_bn, w_tar / 0.7, 0.7, S.Tail())
            return [*losses, back(S.xp.ones_like(a)) - 1]
        yield f"tap {w_bn} {w_tar}", plain, ours, (a, gamma, mean, var)
    yield "tap at rest", functools.partial(plain, w_bn=1), functools.partial(ours, w_bn=1), still
    def matching(f, z, y):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(S, "GPU_THREADS", 9)
            loss, back = f(1.3 * (z > 0), y, 3, 1.7, 1.3)
            return [S.xp.asarray(loss), back(300.0)]
    yield ("rate", *(functools.partial(matching, f) for f in (S.rate_matching,
                                                              S.fast_rate_matching)),
           normal(0, (15, 2, 3, 4), (5, 2, 3, 4)))
    def updates(optimiser, settings, p, g, fast):
        params, state = {"p": p.copy()}, {}
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, S, "fast", S.fast)
            S.fast = lambda x: fast
            for _ in range(2):
                optimiser(params, {"p": g}, state, 0.3, *settings)
        return [params["p"], *map(S.xp.asarray, state.values())]
    for optimiser, *settings in ((S.sgd, 0.8, False, 0.1), (S.sgd, 0.8, True, 0.1), (S.adam,)):
        ways = (functools.partial(updates, optimiser, settings, fast=f) for f in (False, True))
        yield f"{optimiser.__name__} {settings}", *ways, normal(0, (3, 4), (3, 4))

def window_cases(S):
    """As kernel_cases, in float32 and in TF32, where the plain operators get rounded arguments."""
    def rounded(a):  # to the nearest number of 10 bits after the point
        return (a.astype("f4").view("u4") + 0x1000 & 0xffffe000).view("f4").astype(float)
    for i, ((N, H, W, C, K, R, Q, stride, blocks), tf32) in enumerate(itertools.product((
            (5, 8, 8, 3, 2, 3, 3, 1, 9), (3, 7, 9, 32, 8, 3, 3, 2, 6), (2, 9, 8, 4, 72, 1, 5, 1, 9),
            (3, 6, 6, 6, 20, 1, 1, 2, 1), (3, 7, 8, 2, 3, 5, 5, 2, 2),
            (2, 5, 4, 64, 72, 1, 1, 1, 3), (2, 5, 4, 64, 40, 1, 1, 1, 2)), (False, True))):
        def plain(x, w, dy, stride=stride, seen=rounded if tf32 else np.array):
            y, back = S.conv2d(seen(x), seen(w), stride)
            return [y, *back(seen(dy))]
        def ours(x, w, dy, stride=stride, blocks=blocks, tf32=tf32):
            x, w, dy = (a.astype("f4") for a in (x, w, dy))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(S, "GPU_BLOCKS", blocks)
                patch.setattr(S, "TF32", int(tf32))
                y, back = S.gpu_conv2d(x, w, stride)
                return [y, *back(dy)]
        shapes = (N, H, W, C), (K, C, R, Q), (N, -(-H // stride), -(-W // stride), K)
        arrays = [a.astype("f4").astype(float) for a in normal(i, *shapes)]
        yield f"windows {i}", plain, ours, arrays

def assert_kernels_agree(found, expected, name, single=1e-6, double=1e-10):
    for a, b in zip(found, expected, strict=True):
        tol = single if getattr(a, "dtype", "") == "f4" else double
        assert a is None is b or assert_close(a, b, tol) is None, name

@checks()
def kernels_are_their_operators(S, cases=kernel_cases):
    for name, plain, ours, arrays in cases(S):
        expected = plain(*arrays)
        with emulated_gpu(S):
            found = ours(*arrays)
        assert_kernels_agree(found, expected, name)

@checks()
def gpu_conv2d_is_conv2d(S):
    with pytest.MonkeyPatch.context() as patch:
        for early in (False, True):
            patch.setattr(Kernel, "early", early)
            kernels_are_their_operators(S, window_cases)

@pytest.mark.parametrize("tf32", (0, 1))
def test_kernels_do_not_hide_what_is_not_a_number(monkeypatch, tf32):
    monkeypatch.setattr(stars, "TF32", tf32)
    x, w = (a.astype("f4") for a in normal(0, (5, 8, 8, 3), (2, 3, 3, 3)))
    x[1, 2, 3, 0] = np.uint32(0x7fffffff).view("f4")  # the one that a GPU makes
    expected = np.isnan(stars.conv2d(x, w)[0])
    v = np.ones(3, "f4")
    with emulated_gpu(stars):
        y, back = stars.gpu_conv2d(x, w)
        dw = back(np.ones_like(y))[1]
        (z, running), _ = stars.norm_activation(x, v, v, v, v, train=True)
    assert 0 < expected.sum() == np.isnan(y).sum() and (np.isnan(y) == expected).all()
    assert np.isnan(dw[:, 0]).all() and np.isfinite(dw[:, 1:]).all()
    assert [np.isnan(r).tolist() for r in running] == 2 * [[True, False, False]]

def whole_pair():
    nets = net_of(stars, "option A", stars.relu), net_of(stars, "option A", stars.Neuron(), seed=1)
    return [*({k: v.astype("f4") for k, v in net.params.items()} for net in nets),
            images_of("option A", 4).astype("f4")]

def whole_steps(pair):
    """A synthesis loss and a distillation step in float32 on the device of the arrays."""
    teacher, x = stars.Net(pair[0]), pair[2]
    student = {k: v.copy() for k, v in pair[1].items()}
    student = stars.Net(student, stars.Neuron(0.8, "soft", 0.5), 3)
    V = dict.fromkeys(stars.batch_norms(teacher.params), 1.0)
    parts, dx = stars.synthesis_loss(x, teacher, student)
    losses = stars.distillation_step(student, {}, x, teacher, 4.0, 0.1, 5e-4, 20.0, 300.0, V)
    return [parts, dx, losses, student.params]

def test_kernels_compute_whole_steps():
    plain = whole_steps(whole_pair())
    with emulated_gpu(stars):
        ours = whole_steps(whole_pair())
    assert_same_norms(ours, plain)

class Elsewhere:
    """An array that, like one of CuPy, meets no array of NumPy and becomes one by get() alone."""
    __array_ufunc__ = None

    def __init__(self, a):
        self.a = a

    def __array__(self, *_, **__):
        raise TypeError("an array of the GPU where one of NumPy is asked for")

    def __getattr__(self, name):
        if name.startswith("__") or name == "ctypes":
            raise AttributeError(name)
        value = getattr(self.a, name)
        return sent(value) if callable(value) else there(value)

    def __getitem__(self, index):
        return there(self.a[here(index)])

    def __setitem__(self, index, value):
        self.a[here(index)] = here(value)

    def __iter__(self):
        return map(there, self.a)

    def get(self):
        return np.array(self.a)

def here(value):
    """The arguments of a function of CuPy as NumPy's."""
    assert not isinstance(value, np.ndarray), "an array of NumPy among those of the GPU"
    if isinstance(value, (tuple, list)):
        return type(value)(map(here, value))
    return value.a if isinstance(value, Elsewhere) else value

def there(value):
    """What a function of NumPy gives as CuPy gives it: numbers are arrays as well."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(there, value))
    return Elsewhere(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value

def sent(f):
    return lambda *args, **named: there(f(*map(here, args), **{k: here(v)
                                                               for k, v in named.items()}))

def operator_of(name):
    def operate(self, *others):
        result = getattr(self.a, name)(*map(here, others))
        return self if result is self.a else there(result)
    return operate

for name in "add sub mul truediv floordiv mod pow matmul and or xor".split():
    for full in (f"__{name}__", f"__r{name}__", f"__i{name}__"):
        setattr(Elsewhere, full, operator_of(full))
for name in "eq ne lt le gt ge neg abs invert".split():
    setattr(Elsewhere, f"__{name}__", operator_of(f"__{name}__"))
for name in "len int float bool".split():
    setattr(Elsewhere, f"__{name}__", lambda self, name=name: getattr(self.a, f"__{name}__")())

class CuPy:
    """numpy in place of cupy, on arrays that keep to themselves; a GPU without tensor cores."""
    linalg = types.SimpleNamespace(norm=sent(np.linalg.norm))
    cuda = types.SimpleNamespace(Device=lambda: types.SimpleNamespace(compute_capability="75"))

    def __getattr__(self, name):
        if name in ("asarray", "array", "ascontiguousarray"):  # these bring arrays to the GPU
            return lambda a, *more, **named: there(np.array(getattr(np, name)(
                [v.a if isinstance(v, Elsewhere) else v for v in a] if isinstance(a, (list, tuple))
                else a.a if isinstance(a, Elsewhere) else a, *more, **named)))
        value = getattr(np, name)
        return value if isinstance(value, type) or not callable(value) else sent(value)

    class RawKernel(Kernel):
        def __call__(self, grid, block, arguments):
            super().__call__(grid, block, [*map(here, arguments)])

def kernels_met(monkeypatch):
    """{code: name} of the kernels that emulated_gpu meets from now on, and does not run."""
    seen = {}
    monkeypatch.setattr(Kernel, "__init__", lambda self, *of: seen.update([of]))
    monkeypatch.setattr(Kernel, "__call__", lambda *_: None)
    return seen

def test_kernels_compile_for_gpus(tmp_path, monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    seen = kernels_met(monkeypatch)
    monkeypatch.setitem(globals(), "assert_kernels_agree", lambda *_: None)
    with np.errstate(all="ignore"):  # in what they left unwritten
        for cases in kernel_cases, window_cases:
            kernels_are_their_operators(stars, cases)
    alike = {}  # of those that differ in numbers alone, one
    for code, name in seen.items():
        for real in ("double", "float"):
            one = code.replace(stars.DEVICE, "").replace("double", real)
            alike[without_numbers(one)[0]] = one, name
    assert {name for _, name in alike.values()} == {*stars.KERNELS}
    with open(path := tmp_path / "kernels.cu", "w") as file:
        print(stars.DEVICE, file=file)
        for i, (code, name) in enumerate(alike.values()):
            names = re.findall(r"#define (\w+)", code)
            code = code.replace(f"void {name}(", f"void {name}_{i}(")
            print(code, *(f"#undef {k}" for k in names), sep="\n", file=file)
    assert subprocess.run(["nvcc", "-w", "-fatbin", "-gencode=arch=compute_80,code=[sm_80,sm_90]",
                           "-o", tmp_path / "fatbin", path]).returncode == 0
    CLOSING.append(f"kernels: {len(alike)} compiled for sm_80 and sm_90")

def test_gpu_products_stay_in_registers(monkeypatch):
    """Of the shapes that matter, as CuPy's compiler has them, which needs no GPU: sums in local
    memory would take four times as long."""
    reason, seen = "no cuda-pathfinder, nvidia-cuda-nvrtc here", kernels_met(monkeypatch)
    pathfinder = pytest.importorskip("cuda.pathfinder", reason=reason)
    try:
        nvrtc = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except pathfinder.DynamicLibNotFoundError:
        pytest.skip(reason)
    with emulated_gpu(stars), np.errstate(all="ignore"):  # in what they left unwritten
        for tf32, (C, K, stride) in itertools.product((0, 1), (
                (16, 16, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 65, 1), (64, 128, 2),
                (256, 256, 1))):
            monkeypatch.setattr(stars, "TF32", tf32)
            y, back = stars.gpu_conv2d(np.ones((2, 8, 8, C), "f4"), np.ones((K, C, 3, 3), "f4"),
                                       stride)
            back(y)
    options = (ctypes.c_char_p * 2)(b"-arch=sm_90", b"--ptxas-options=-v")
    for code in seen:
        program, log = ctypes.c_void_p(), ctypes.create_string_buffer(1 << 16)
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), None, 0, None, None)
        assert nvrtc.nvrtcCompileProgram(program, len(options), options) == 0
        nvrtc.nvrtcGetProgramLog(program, log)
        assert b" 0 bytes stack frame, 0 bytes spill stores" in log.value, code
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert len(seen) == 48

@pytest.fixture
def gpu():
    """Skips where no GPU works; arrays are on the CPU until on("gpu", ...)."""
    try:
        stars.use_device("gpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    stars.use_device("cpu")

def on(device, f, tree, *more):
    """f(tree, *more) on a device: arrays of the tree go there and those of the result come back."""
    def moved(move, value):
        if isinstance(value, dict):
            return {k: moved(move, v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [moved(move, v) for v in value]
        return move(value) if hasattr(value, "dtype") else value
    stars.use_device(device)
    result = moved(stars.to_host, f(moved(stars.xp.array, tree), *more))
    stars.use_device("cpu")
    return result

@pytest.mark.parametrize("dtype, tol, least", (("float64", 1e-9, 1e-3), ("float32", 1e-4, 0.05)))
def test_gpu_operators_agree(gpu, dtype, tol, least):
    for name, f, args in operator_cases(stars):
        args = [np.asarray(a, dtype) for a in args]
        pairs = zip(*(on(device, lambda a: outputs(f, a), args) for device in ("cpu", "gpu")))
        for a, b in pairs:
            assert a.dtype == b.dtype == dtype, name
            assert abs(a - b).max() <= tol * max(abs(a).max(), least), name

def test_gpu_kernels_agree(gpu):
    for name, plain, ours, arrays in itertools.chain(kernel_cases(stars), window_cases(stars)):
        assert_kernels_agree(on("gpu", lambda tree: ours(*tree), [*arrays]),
                             on("cpu", lambda tree: plain(*tree), [*arrays]), name, 5e-6, 1e-9)

def test_gpu_kernels_compute_whole_steps(gpu):  # a spike that flips would show
    assert_same_norms(*(on(device, whole_steps, whole_pair()) for device in ("gpu", "cpu")))

def test_gpu_steps_agree_where_the_spikes_do(gpu, monkeypatch):
    """A distillation and a synthesis step in float32, the spike trains of the CPU on both sides."""
    shapes = {"teacher": stars.weight_shapes("resnet8", 10, 4),
              "student": stars.weight_shapes("resnet8", 10, 4),
              "generator": stars.generator_shapes(32, 8, 16)}
    rng, trains, flips = np.random.default_rng(0), [], []
    tree = {name: {k: v.astype("f4") for k, v in stars.init_weights(s, rng, np.float64).items()}
            for name, s in shapes.items()}
    tree["z"] = rng.normal(size=(8, 16)).astype("f4")
    offsets, mirrored = stars.draw_augmentation(rng, 8)
    plain_lif = stars.lif
    monkeypatch.setattr(stars, "fast", lambda x: False)  # the definitions, on both sides

    def steps(tree, spike):
        monkeypatch.setattr(stars, "lif", lambda *args: plain_lif(*args, spike=spike))
        teacher = stars.Net(tree["teacher"])
        student = stars.Net(tree["student"], stars.Neuron(0.8, "soft", 0.5), 4)
        images, back = stars.generator(tree["generator"], tree["z"])
        images, augment_back = stars.augment(images, offsets, mirrored)
        parts, dx = stars.synthesis_loss(images, teacher, student)
        generator_grads = back(augment_back(dx))[1]
        stars.adam(tree["generator"], generator_grads, {}, 1e-3)
        t, s = stars.forward(teacher, images)[0], stars.forward(student, images, train=True)
        loss, loss_back = stars.distillation_loss(t.logits, s[0].logits)
        grads = s[1](loss_back())[1]
        stars.sgd(tree["student"], grads, {}, 0.1, nesterov=True)
        return [parts, loss, dx, generator_grads, grads, tree["student"], s[0].running]

    def record(x):
        trains.append((x >= 0).astype(x.dtype))
        return trains[-1]
    cpu, replay = on("cpu", steps, tree, record), iter(trains)
    def inject(x):
        s = stars.xp.asarray(next(replay))
        flips.append(float(((x >= 0) != (s > 0)).mean()))
        return s
    gpu_side = on("gpu", steps, tree, inject)
    CLOSING.append(f"GPU: {100 * np.mean(flips):.4f} % of the spikes flip")
    assert next(replay, None) is None and np.mean(flips) < 1e-3
    assert_same_norms(cpu, gpu_side)

# ---- 10  Data and files --------------------------------------------------------------------------

def refused(text, call, *args, **options):
    """The call ends in a UserError of one short line that holds text."""
    with pytest.raises(stars.UserError) as caught:
        call(*args, **options)
    sentence = str(caught.value)
    assert text in sentence and "\n" not in sentence and len(sentence) < 1200, sentence
    return sentence

COUNTS = {"train": 20, "test": 6}

@pytest.fixture
def small(monkeypatch):
    """The data sets have 20 images to train on and 6 to test on. publish(name, path): take the MD5
    of this file for that of the published archive."""
    for name, classes in ("cifar10", 10), ("cifar100", 100), ("tiny-imagenet", 4):
        few = stars.DATASETS[name]._replace(classes=classes, **COUNTS)
        monkeypatch.setitem(stars.DATASETS, name, few)
    def publish(name, path):
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(stars.DATASETS, name, stars.DATASETS[name]._replace(md5=md5))
    return publish

def cifar_files(name):
    """{path in the archive: bytes}, {split: (x, y)}, byte by byte from the format's description."""
    rng, files, truth, known = np.random.default_rng(0), {}, {}, stars.DATASETS[name]
    for (split, n), parts in zip(COUNTS.items(), (known.train_files, known.test_files)):
        x = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        y = rng.integers(0, known.classes, n)
        head = lambda label: bytes([label // 5, label])[name == "cifar10":]
        records = [head(k) + image.transpose(2, 0, 1).tobytes() for image, k in zip(x, y)]
        truth[split] = x, y
        for k, part in enumerate(parts):
            files[f"{known.folder}/{part}"] = b"".join(
                records[k * n // len(parts):][:n // len(parts)])
    return files, truth

def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

def write_tar(root, name, members):
    """members: pairs of a name or a TarInfo, and bytes."""
    root.mkdir(exist_ok=True)
    path = root / os.path.basename(stars.DATASETS[name].url)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path

def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)

@pytest.mark.parametrize("name", ("cifar10", "cifar100"))
def test_cifar_reads_what_was_written(small, tmp_path, name):
    files, truth = cifar_files(name)
    write_folder(tmp_path / "folder", files)
    small(name, write_tar(tmp_path / "tar", name, reversed(files.items())))  # in any order
    for form, (split, (images, labels)) in itertools.product(("folder", "tar"), truth.items()):
        x, y = stars.load_dataset(name, split, str(tmp_path / form))
        assert (x == images).all() and (y == labels).all() and (x.dtype, y.dtype) == ("u1", "i8")
    assert len(os.listdir(tmp_path / "tar")) == 1  # nothing was extracted

def test_an_absent_data_set_says_where_to_put_it(small, tmp_path):
    assert stars.find_dataset("cifar10", "test", str(tmp_path)) is None
    refused("cs.toronto.edu", stars.load_dataset, "cifar10", "test", str(tmp_path))
    refused("no data set", stars.find_dataset, str(tmp_path / "none.npz"), "test", ".")
    files, truth = cifar_files("cifar100")
    write_folder(tmp_path, {k: v for k, v in files.items() if "test" in k})
    assert stars.find_dataset("cifar100", "train", str(tmp_path)) is None  # one split is there
    assert (stars.load_dataset("cifar100", "test", str(tmp_path))[1] == truth["test"][1]).all()

def test_the_known_data_sets_are_listed():
    refused("no data set 'mnist': use cifar10, cifar100, tiny-imagenet, shapes, FILE.npz or none",
            stars.find_dataset, "mnist", "test", ".")

def test_a_damaged_folder_of_cifar_is_refused(small, tmp_path):
    files, _ = cifar_files("cifar10")
    name, first = "cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-bin/data_batch_1.bin"
    def check(text, split, changed):
        write_folder(tmp_path, files | changed)
        refused(text, stars.load_dataset, "cifar10", split, str(tmp_path))
    for wrong in (files[name][:-1], files[name] + b"0", b""):
        check("test_batch.bin must have 18438 bytes", "test", {name: wrong})
    check("labels", "test", {name: b"\x0a" + files[name][1:]})
    second = first.replace("_1", "_2")  # one byte that is in the wrong file
    check("data_batch_2.bin", "train", {first: files[first][:-1], second: files[second] + b"0"})
    with open(tmp_path / name, "ab") as file:
        file.truncate(10 ** 12)
    load = lambda: refused("bytes", stars.load_dataset, "cifar10", "test", str(tmp_path))
    assert peak_memory(load) < 10 ** 5
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused("s a directory", stars.load_dataset, "cifar10", "test", str(tmp_path))

def test_an_archive_that_is_not_the_published_one_is_not_opened(small, tmp_path):
    path = write_tar(tmp_path, "cifar10", cifar_files("cifar10")[0].items())
    small("cifar10", path)
    whole = path.read_bytes()
    flipped = whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]
    load = lambda: refused("not the file that was published): delete it and add --download",
                           stars.load_dataset, "cifar10", "test", str(tmp_path))
    zeros, header = zlib.compressobj(1, wbits=31), tarfile.TarInfo("a")
    header.size, header.type = 1 << 33, tarfile.XHDTYPE  # of 8 GiB, of which 128 MiB are there
    pieces = map(zeros.compress, [header.tobuf(), *[bytes(1 << 20)] * 128])
    for wrong in (*(whole[:cut] for cut in (0, 1, 10, 100, len(whole) - 1)), whole + b"0", flipped,
                  b"<html></html>", b"".join(pieces) + zeros.flush()):
        path.write_bytes(wrong)
        assert peak_memory(load) < 2 * len(wrong) + 10 ** 6
    with open(path, "ab") as file:
        file.truncate(260_000_001)
    assert peak_memory(load) < 10 ** 6
    path.write_bytes(whole)
    stars.load_dataset("cifar10", "test", str(tmp_path))

def peak_memory(call):
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def jpeg(size, colour):
    Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    image = Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour)
    image.save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.getvalue()

def tiny_files():
    """Images of one colour each, the first of each class in grey; the colours and labels."""
    rng, ids = np.random.default_rng(1), [f"n0000000{k}" for k in (7, 1, 9, 3)]
    names = {"test": [(f"val/images/val_{k}.JPEG", ids[k % 4]) for k in range(6)],
             "train": [(f"train/{c}/images/{c}_{k}.JPEG", c) for c in ids for k in range(5)]}
    names["train"].sort()
    lines = "".join(f"{name[11:]}\t{c}\t0\t32\t44\t62\n" for name, c in names["test"])
    files = {"wnids.txt": "\n".join(ids).encode(), "val/val_annotations.txt": lines.encode()}
    truth = {"train": [], "test": []}
    for split, name, c in ((split, *pair) for split in names for pair in names[split]):
        colour = tuple(map(int, rng.integers(0, 256, 3)))
        grey = name.endswith("_0.JPEG") and split == "train"
        files[name] = jpeg((64, 64), colour[0] if grey else colour)
        truth[split].append((colour[:1] * 3 if grey else colour, sorted(ids).index(c)))
    return {"tiny-imagenet-200/" + name: data for name, data in files.items()}, truth

def test_tiny_imagenet(small, tmp_path, monkeypatch):
    files, truth = tiny_files()
    write_folder(tmp_path / "folder", files)
    (tmp_path / "zip").mkdir()
    write_zip(path := tmp_path / "zip" / "tiny-imagenet-200.zip", files)
    small("tiny-imagenet", path)
    for split, form in itertools.product(truth, ("folder", "zip")):
        x, y = stars.load_dataset("tiny-imagenet", split, str(tmp_path / form))
        assert x.shape == (COUNTS[split], 64, 64, 3) and y.tolist() == [c for _, c in truth[split]]
        assert abs(x.mean((1, 2)) - [colour for colour, _ in truth[split]]).max() < 4
    path.write_bytes(path.read_bytes()[:-1])
    refused("not the file", stars.load_dataset, "tiny-imagenet", "test", str(tmp_path / "zip"))
    load = lambda: stars.load_dataset("tiny-imagenet", "test", str(tmp_path / "folder"))
    folder = "tiny-imagenet-200/val/"
    image, labels = folder + "images/val_0.JPEG", folder + "val_annotations.txt"
    for name, data in ((image, b""), (image, b"\x89PNG"), (image, b"\xff\xd8\xff"), (labels, b""),
                       (image, jpeg((1, 64), (1, 2, 3))), (labels, b"\xff\xfe"),
                       (image, jpeg((1999, 1999), 0)),
                       (labels, b"../../x.JPEG\tn00000001\t0\n")):
        write_folder(tmp_path / "folder", files | {name: data})
        assert peak_memory(lambda: refused("tiny-imagenet-200 cannot be read", load)) < 5 * 10 ** 6
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused("pip install pillow", load)

X32 = np.zeros((3, 32, 32, 3), np.uint8)

def test_a_data_set_of_your_own(tmp_path):
    path, rng = str(tmp_path / "mine.npz"), np.random.default_rng(0)
    load = lambda split="test", **more: stars.load_dataset(path, split, "nowhere", **more)
    for size in (32, 64):
        x, y = rng.integers(0, 256, (7, size, size, 3), dtype=np.uint8), np.arange(7, dtype="u1")
        np.savez_compressed(path, x_test=x, y_test=y)
        got, labels = load(classes=7)
        assert (got == x).all() and (labels == y).all() and labels.dtype == "i8"
    refused("x_train", load, "train")
    refused("labels", load, classes=6)
    for x, y in ((X32.astype("f4"), [0, 1, 2]), (X32.transpose(0, 3, 1, 2), [0, 1, 2]), (X32[0], 3),
                 (X32, [0, 1]), (X32, [0, 1, -1]), (X32, [0., 1, 2]), (X32, [[0], [1], [2]]),
                 (X32[:0], []), (X32[:, :28, :28], [0, 1, 2]), (X32[..., :1], [0, 1, 2]),
                 (np.uint8(3), 3), (X32, [0, 1, 40000]), (np.array([None, {}]), [0, 1])):
        np.savez(path, x_test=x, y_test=np.asarray(y))
        refused("mine.npz cannot be read", load)

def test_pixel_statistics_are_exact_for_any_number_of_images():
    x = np.random.default_rng(0).integers(0, 256, (1234, 5, 4, 3), np.uint8)
    for found, wanted in zip(stars.pixel_statistics(x), ((x / 255).mean((0, 1, 2)),
                                                         (x / 255).std((0, 1, 2)))):
        assert found == wanted.round(4).tolist()
    white = np.broadcast_to(np.uint8(255), (17_000, 32, 32, 3))  # above 2^24 pixels
    assert stars.pixel_statistics(white) == ([1, 1, 1], [0, 0, 0])

def test_logits_that_are_not_finite_have_no_accuracy():
    params = {k: v.astype("f4") for k, v in TEACHER.params.items()}
    params["linear.bias"] = params["linear.bias"] + np.float32("inf")
    net, x = TEACHER._replace(params=params), np.zeros((2, 8, 8, 3), np.uint8)
    refused("logits are not finite", stars.evaluate, net, x, np.zeros(2, int))

def test_shapes_are_repeatable_balanced_and_not_linear():
    (x, y), (again, labels) = stars.draw_shapes(2000, 0), stars.draw_shapes(2000, 0)
    held, truth = stars.load_dataset("shapes", "test", "nowhere")
    assert (x == again).all() and (y == labels).all() and (x.dtype, y.dtype) == ("u1", "i8")
    assert x.shape[1:] == (32, 32, 3) and np.bincount(y).min() > 160 and held.shape == x.shape
    assert not (held == x).all((1, 2, 3)).any()
    known = stars.DATASETS["shapes"]
    assert np.allclose(x.mean((0, 1, 2)) / 255, known.mean, atol=.02)
    assert np.allclose(x.std((0, 1, 2)) / 255, known.std, atol=.02)
    flat = lambda images: images[:, ::2, ::2].reshape(len(images), -1) / 127.5 - 1
    a = flat(x)  # ridge regression on the pixels
    w = np.linalg.solve(a.T @ a + 100 * np.eye(a.shape[1]), a.T @ (np.eye(10)[y] - .1))
    assert ((flat(held) @ w).argmax(1) == truth).mean() < .25

BODY = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()

class Answers(http.server.BaseHTTPRequestHandler):
    """A server with every fault, by the name of what is asked for."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.close_connection, kind = True, self.path.strip("/")
        if kind == "missing":
            return self.send_error(404)
        if kind == "garbage":
            return self.wfile.write(b"this is not http\n\n" * 3)
        if kind == "silent":
            return time.sleep(20)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        self.send_response(302 if kind in ("loop", "once") else 200)
        if kind in ("loop", "once"):
            self.send_header("Location", "/loop" if kind == "loop" else "/good")
        length = {"short": len(BODY) + 5, "long": len(BODY) - 5, "huge": 10 ** 12, "odd": "many",
                  "loop": 0, "once": 0}.get(kind, len(BODY))
        if kind not in ("none", "endless"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        pieces = {"loop": [], "once": [], "cut": [BODY[:99_999]], "wrong": [BODY[:-1] + b"!"],
                  "stalls": [BODY[:99_999], 20], "endless": [BODY] * 100}.get(kind, [BODY])
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece) if isinstance(piece, bytes) else time.sleep(piece)

@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{it.server_port}/"
        it.shutdown()

def test_downloads_are_whole_or_leave_what_was_there(server, tmp_path):
    for kind, announced in (("good", len(BODY)), ("none", 0), ("once", len(BODY)),
                            ("short", len(BODY) + 5)):  # the MD5 decides
        seen, path = [], tmp_path / kind / "file"
        def progress(*numbers):
            seen.append(numbers)
            assert os.listdir(tmp_path) == before  # killed now, it would leave nothing
        before = os.listdir(tmp_path)
        stars.download(server + kind, MD5, path, 10 ** 6, progress)
        assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
        assert seen[-1] == (len(BODY), announced)
    path.write_bytes(b"old")
    for kind in ("loop", "missing", "garbage", "silent", "reset", "long", "huge", "endless", "odd",
                 "cut", "stalls", "wrong"):
        url, start = server + kind, time.monotonic()
        why = refused(url, stars.download, url, MD5, path, 10 ** 6, timeout=.3)
        assert time.monotonic() - start < 15 and f"good copy at {path}" in why
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]

def test_a_download_from_nobody(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but nobody listens
        for url in (f"http://127.0.0.1:{held.getsockname()[1]}/x", "nonsense", "http://a:99999/"):
            refused(f"{url} cannot be read", stars.download, url, MD5, tmp_path / "file", 10 ** 6)
    assert os.listdir(tmp_path) == []

def run_python(code, *args, **options):
    return subprocess.Popen([sys.executable, "-B", "-c", code, *map(str, args)], text=True,
                            cwd=Path(stars.__file__).parent, stdout=subprocess.PIPE, **options)

DOWNLOAD = "import stars, sys; stars.download(*sys.argv[1:4], 10 ** 6)"

def test_two_processes_download_at_once(server, tmp_path):
    for other in ("good", "wrong"):
        both = [run_python(DOWNLOAD, server + kind, MD5, tmp_path / "file", stderr=subprocess.PIPE)
                for kind in ("good", other)]
        told = [process.communicate()[1] for process in both]
        assert [process.returncode for process in both] == [0, int(other == "wrong")]
        assert "UserError" in told[1] or other == "good"
        assert (tmp_path / "file").read_bytes() == BODY and os.listdir(tmp_path) == ["file"]
        (tmp_path / "file").unlink()

@pytest.mark.parametrize("error", (OSError(28, "No space"), KeyboardInterrupt(),
                                   stars.UserError("x")))
@pytest.mark.parametrize("when", ("write", "fsync", "replace"))
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error, when):
    stars.write_atomic(path := tmp_path / "new" / "file", b"old")
    def fail(*_):
        raise error
    if when != "write":
        monkeypatch.setattr(os, when, fail)
    with pytest.raises((stars.UserError, KeyboardInterrupt), match="No space|x|^$"):
        stars.write_atomic(path, fail if when == "write" else b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path / "new") == ["file"]
    monkeypatch.undo()
    stars.write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    refused("cannot write", stars.write_atomic, path / "x", b"")
    refused("cannot write", stars.write_atomic, tmp_path, b"")  # a folder is in the way

def test_a_full_disk_in_a_process(server, tmp_path):
    resource = pytest.importorskip("resource", reason="no file size limits here")
    (path := tmp_path / "w.npz").write_bytes(b"old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for call in ("save_weights(sys.argv[1], {'w': np.ones((999, 999))}, {})",
                 "download(*sys.argv[2:], sys.argv[1], 10 ** 6)"):
        code = (f"import stars, sys, numpy as np\ntry: stars.{call}\n"
                "except stars.UserError as error: print(error)")
        told = run_python(code, path, server + "good", MD5, preexec_fn=limit).communicate()[0]
        assert told.startswith("cannot write") and "make room" in told and told.count("\n") == 1
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["w.npz"]

def some_params(classes=10):
    rng, shapes = np.random.default_rng(0), {
        "conv1.weight": (16, 3, 3, 3), "bn1.weight": (16,), "bn1.running_var": (16,),
        "bn1.v_th": (), "linear.bias": (classes,), "linear.weight": (classes, 16)}
    return {name: np.asarray(abs(rng.normal(size=s)), np.float32) for name, s in shapes.items()}

def test_weights_come_back_as_they_were_rounded(tmp_path):
    path, params = tmp_path / "w.npz", some_params()
    info = {"arch": "resnet20", "T": 4, "mean": np.float32([.5, .25, .5]), "note": "\u00e9"}
    stars.save_weights(path, params, info)
    got, read = stars.load_weights(path)
    assert read == info | {"classes": 10, "mean": [.5, .25, .5]} and got.keys() == params.keys()
    stored = stars.rounded(params)
    for name, a in params.items():
        assert got[name].dtype == "f4" and (got[name] == stored[name]).all()
        assert (stored[name] == (a.astype(np.float16) if a.ndim > 1 else a)).all()
    np.savez_compressed(tmp_path / "f.npz", **{n: np.asfortranarray(a) for n, a in params.items()})
    again, _ = stars.load_weights(tmp_path / "f.npz", "resnet20")
    assert all((again[name] == a).all() for name, a in params.items())
    with np.load(path) as plain:  # anybody can read it
        assert plain["conv1.weight"].dtype == "f2" and json.loads(str(plain["info"]))["T"] == 4
    same = {name: params[name].astype("f8", order="F") for name in reversed(params)}
    stars.save_weights(tmp_path / "b.npz", same, dict(reversed(info.items())))
    assert path.read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(path) as archive:  # at any time
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
    stored = stars.rounded({"big": np.full((2, 2), 1e5), "small": np.ones((2, 2))})
    assert [a.dtype for a in stored.values()] == ["f4", "f2"] and stored["big"][0, 0] == 1e5
    refused("w is not finite", stars.rounded, {"w": np.array([math.nan])})

def test_arch_and_classes_must_agree(tmp_path):
    path, params = tmp_path / "w.npz", some_params()
    for info, args, text in (
            ({"arch": "resnet20"}, ("resnet32",), "its arch is resnet20, not resnet32"),
            ({"arch": "resnet20"}, (None, 100), "classes is 10, not 100"), ({}, (), "add --arch"),
            ({"classes": 11}, (), "classes is 11, not 10"), ({"arch": ["x"]}, (), "add --arch")):
        stars.save_weights(path, params, info)
        refused(text, stars.load_weights, path, *args)
    for n, text in (0, "0 linear layers, not 1: "), (2, "2 linear layers, not 1: fc.1.weight, fc."):
        more = {f"fc.{2 * k + 1}.weight": np.ones((10, 10)) for k in range(n)}
        stars.save_weights(path, {k: v for k, v in params.items() if v.ndim != 2} | more, {})
        refused(text, stars.load_weights, path, "resnet8")
    stars.save_weights(path, params, {})
    assert stars.load_weights(path, "resnet8", 10)[1] == {"arch": "resnet8", "classes": 10}
    assert all(a.flags.writeable for a in stars.load_weights(path, "resnet8")[0].values())

@pytest.mark.parametrize("last", ["fc.", "linear.", "classifier.", "head.fc.", "classifier.1."])
@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.module.", "_orig_mod.", "net.base."])
def test_names_of_public_checkpoints(last, prefix):
    names = {"conv1.weight": "conv1.weight", "layer1.0.bn1.weight": "layer1.0.bn1.weight",
             "layer2.0.downsample.0.weight": "layer2.0.shortcut.0.weight",
             "layer2.0.shortcut.1.bias": "layer2.0.shortcut.1.bias",
             "conv1.1.weight": "bn1.weight", "conv3_x.1.shortcut.0.w": "layer2.1.shortcut.0.w",
             "conv5_x.0.residual_function.0.weight": "layer4.0.conv1.weight",
             "conv4_x.1.residual_function.1.bias": "layer3.1.bn1.bias",
             "conv2_x.1.residual_function.3.weight": "layer1.1.conv2.weight",
             "conv2_x.1.residual_function.4.running_var": "layer1.1.bn2.running_var",
             "bn1.num_batches_tracked": None, "n_averaged": None,
             last + "weight": "linear.weight", last + "bias": "linear.bias"}
    theirs = {prefix + n: np.full((2, 3) if n == last + "weight" else (), k, np.float32)
              for k, n in enumerate(names)}
    ours = {ours: theirs[prefix + name] for name, ours in names.items() if ours}
    assert stars.public_names(theirs) == ours
    vgg = stars.public_names(theirs | {prefix + "features.0.weight": np.float32(0)})
    assert {"classifier.weight", "classifier.bias"} < vgg.keys()
    if last != "linear.":
        with pytest.raises(ValueError, match="two names, .*: linear.bias$"):
            stars.public_names(theirs | {prefix + "linear.bias": np.float32(0)})
    mixed = stars.public_names(theirs | {"epoch": np.float32(1), "module.x": np.float32(1)})
    assert {"epoch", "module.x"} < mixed.keys()  # left for the list of what is wrong

def test_biases_of_vgg_go_into_the_running_mean():
    w, b, mean, var, x = normal(0, (4, 3, 1, 1), (4,), (4,), (4,), (7, 1, 1, 3))
    raw = {"features.0.weight": w, "features.0.bias": b, "features.1.running_mean": mean}
    got = stars.public_names(raw)
    assert set(raw) - set(got) == {"features.0.bias"}
    y, name = stars.conv2d(x, w)[0], "features.1.running_mean"
    norm = lambda y, p: stars.batch_norm(y, mean, mean, p[name], var ** 2)[0][0]
    assert_close(norm(y, got), norm(y + b, raw))
    odd = raw | {"features.0.bias": b[:1], f"features.{'9' * 150}.bias": b}
    assert "features.0.bias" in stars.public_names(odd)  # not broadcast: left over

def test_all_that_does_not_fit_is_listed():
    params = some_params()
    shapes = {name: a.shape for name, a in params.items()}
    turned = dict(reversed(shapes.items()))
    assert list(stars.check_weights(params, turned)) == list(turned)
    wrong = {k.replace("bn1.weight", "extra"): v for k, v in params.items()}
    wrong["bn1.v_th"] = np.ones(1)
    for text in ("w.npz does not fit", "bn1.weight is missing, not (16,)",
                 "extra (16,), not known", "bn1.v_th (1,), not ()"):
        refused(text, stars.check_weights, wrong, shapes, "w.npz")
    long = refused("12 more", stars.check_weights, {}, {f"layer{k}": () for k in range(20)})
    assert "layer7" in long and "layer8" not in long
    others = {f"layer{k}": np.ones(2) for k in range(20)}  # strangers come first
    refused("(other (1,), not known;", stars.check_weights, others | {"other": np.ones(1)},
            {f"layer{k}": (3,) for k in range(20)})

def raw_npz(path, header, data=b"", magic=b"\x93NUMPY\x01\x00", **options):
    """An .npz whose one entry has any header."""
    header = header if isinstance(header, bytes) else header.encode("latin1")
    size = struct.pack("<H" if magic[6] == 1 else "<I", len(header))
    write_zip(path, {"w.npy": magic + size + header + data}, **options)

HEAD = "{'descr': %s, 'fortran_order': False, 'shape': %s, }\n"

def test_hostile_files_of_weights_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    def check(text="w.npz cannot be read"):
        refused(text, stars.load_weights, path, "resnet20")
    check("No such file")
    refused("s a directory", stars.load_weights, tmp_path, "resnet20")
    for descr, shape, data in (
            ("'|O'", "(1,)", b"cos\nsystem\n(S'true'\ntR."), ("'<f4'", "(2,)", b"1234"),
            ("'<f4'", "(-1, -1)", b"1234"), ("'<f4'", "(10**12,)", b""), ("'<f4", "(1,)", b""),
            ("'<f4'", "(1000000000000,)", b""), ("'<f4'", "(0, 99999999999999999999)", b""),
            ("'<U0'", "(1000000000000,)", b""), ("[('a', '<f4')]", "(1,)", b"1234"),
            ("'<M8[s]'", "(1,)", b"12345678"), ("'<f4'", "(True,)", b"12"),
            ("'|S4'", "(1,)", b"1234"), ("'|V4'", "(1,)", b"1234"), ("'<U1'", "(1,)", b"1234"),
            ("'<c8'", "(1,)", b"12345678"), ("{[]: 1}", "(1,)", b""), ("'<f4'", "(" * 3000, b"")):
        raw_npz(path, HEAD % (descr, shape), data)
        check()
    raw_npz(path, HEAD % ("'<f4'", "(1,)") + " " * 60_000, b"1234")
    check()
    for version, header in ((2, b" " * 10 ** 7), (9, b" ")):
        raw_npz(path, header, magic=b"\x93NUMPY" + bytes([version, 0]))
        check()
    write_zip(path, {"archive/data.pkl": b"\x80\x02}q\x00."})  # what torch.save writes
    check("PyTorch checkpoints see the README")
    for data in (b"", b"\x80\x02}q\x00.", b"PK\x05\x06", b"\x93NUMPY\x01\x00", BODY[:1000]):
        path.write_bytes(data)
        check()
    for text in ("[1]", "3", "{", '"a"', "[" * 100_000, "\ud800"):
        np.savez(path, info=np.array(text))
        check("info")
    codes = np.array([*map(ord, '{"arch": "'), 0x1000000, *map(ord, '"}')], np.uint32)
    for order in "<>":  # NumPy makes a str of it that Python cannot print
        text = codes.astype(order + "u4").view(f"{order}U{len(codes)}")
        np.savez(path, info=text.reshape(()), **{"linear.weight": np.ones((10, 64))})
        check("info has characters that do not exist")
    for wrong in (math.nan, math.inf, -math.inf, 1e300):
        np.savez(path, **{"fc.weight": np.ones((2, 3)), "b.weight": np.array([wrong])})
        check("b.weight is not finite")
    np.savez(path, **{"bn1.running_var": -np.ones(3)})
    check("bn1.running_var is negative")
    np.savez(path, **{"bn1.weight": np.ones(3, int)})
    check("bn1.weight is int64")
    for name in ("x" * 10 ** 4, "\x1b[2J", "a\nb"):  # would be written to the terminal
        np.savez(path, **{name: np.ones(3)})
        assert refused("or none to speak of", stars.load_weights, path).isprintable()
    with open(path, "wb") as file:
        file.truncate(2 ** 40)
    check("it has more than 512 MiB")
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", b"1")
        archive.writestr("w.npy", b"2")
    check("an entry twice")

def test_zip_bombs_are_refused(tmp_path):
    path, u1 = tmp_path / "w.npz", HEAD % ("'|u1'", "(99999999,)")
    for pack in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        raw_npz(path, u1, bytes(10), compression=pack)
        refused("neither stored nor deflated", stars.load_weights, path)
    for said, text in ((2 ** 29 + 1, "more than 512 MiB"), (138, "cannot be read")):
        raw_npz(path, u1, bytes(99999999), compression=zipfile.ZIP_DEFLATED)
        raw = bytearray(path.read_bytes())  # the directory says another size
        at = raw.index(b"PK\x01\x02") + 24
        raw[at:at + 4] = struct.pack("<I", said)
        path.write_bytes(raw)
        assert peak_memory(lambda: refused(text, stars.load_weights, path)) < 10 ** 7

def test_torture_memory_is_bounded_whatever_a_file_says(tmp_path):
    """Growth of a process that reads weights of zeros up to the limit, and a zip of empty files."""
    pytest.importorskip("resource", reason="the memory of a process is not known here")
    limit = 2 ** 29 if TORTURE else 2 ** 25
    np.savez_compressed(zeros := tmp_path / "zeros.npz", w=np.zeros(limit // 2 - 100, "f2"))
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 9, 5, *[0] * 6)
    entries = b"".join(entry + b"%05x" % k for k in range(10 ** 5))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(entries), 0, 0)
    (many := tmp_path / "many.npz").write_bytes(entries + end)
    code = """if 1:
        import resource, stars, sys
        stars.read_npz.__defaults__ = None, int(sys.argv[2])
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        before = peak()
        try:
            stars.load_weights(sys.argv[1], "resnet8")
        except stars.UserError as error:
            print(peak() - before, error)"""
    for path, text, bound in ((zeros, "0 linear layers", 4 * limit),
                              (many, "cannot be read (Bad", 20 * many.stat().st_size)):
        grown, said = run_python(code, path, limit).communicate()[0].split(" ", 1)
        assert text in said and int(grown) < bound + 2 ** 23, (grown, said)

EDITS = st.lists(st.tuples(  # from which end, where, how much goes, what comes
    st.booleans(), st.one_of(st.integers(0, 60), st.integers(0, 900)),
    st.sampled_from([0, 1, 1, 1, 2, 4, 8, 100, 10 ** 6]), st.one_of(
        st.binary(max_size=8), st.sampled_from([
            b"\xff" * 4, b"\0" * 8, b"\x7f", b"\x80\x7f", b"-1", b"9" * 12, b"|O", b"True", b"\n",
            b"(" * 99, b"\x1b[2J", b"Infinity", b"../", b"1e999"]))), min_size=1, max_size=6)

def edited(raw, edits):
    raw = bytearray(raw)
    for backwards, at, cut, new in edits:
        at = max(0, len(raw) - at) if backwards else at
        raw[at:at + cut] = new
    return bytes(raw)

def npz(members):
    write_zip(buffer := io.BytesIO(), members, compression=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()

def npy(arrays):
    """{name: bytes of the .npy}"""
    files = {}
    for name, array in arrays.items():
        np.save(buffer := io.BytesIO(), array)
        files[name + ".npy"] = buffer.getvalue()
    return files

def is_network(read):
    params, info = read
    assert all(a.dtype == "f4" and np.isfinite(a).all() for a in params.values())
    assert isinstance(info["arch"], str) and info["classes"] == 10
    stars.check_weights(params, {name: a.shape for name, a in some_params().items()})

def is_data_set(read):
    x, y = read
    assert x.dtype == "u1" and x.ndim == 4 and len(x) == len(y) and y.min() >= 0

def valid_files():
    """{kind: (path, bytes or {member: bytes} of a valid file, root -> what is read, its check)}"""
    params, info = some_params(), {"info": np.array('{"arch": "resnet20", "T": 4}')}
    state = {"sgd/w": np.ones((2, 3), order="F"), "net/b": np.float32(2), "adam/n": np.int64(3)}
    cifar, tiny = cifar_files("cifar10")[0], {}
    bin_, val = "cifar-10-batches-bin/test_batch.bin", "tiny-imagenet-200/val/"
    txt, jpg = val + "val_annotations.txt", val + "images/val_0.JPEG"
    load = lambda name: lambda root: stars.load_dataset(name, "test", str(root))
    def checkpoint(root):
        with stars.reading("c.npz", "start a new run"):
            return stars.read_npz(root / "c.npz", limit=2 ** 34)["net/b"]
    files = {
        "weights .npz": ("w.npz", npy(params | info), lambda root: stars.load_weights(
            root / "w.npz", "resnet20"), is_network),
        "checkpoint .npz": ("c.npz", npy(state | info), checkpoint,
                            lambda array: array.sum()),
        "data set .npz": ("d.npz", npy({"x_test": X32, "y_test": np.arange(3)}),
                          lambda root: load(str(root / "d.npz"))(root), is_data_set),
        "cifar10 .bin": (bin_, cifar[bin_], load("cifar10"), is_data_set)}
    with contextlib.suppress(ImportError):
        from safetensors.numpy import save
        files["weights .safetensors"] = ("w.safetensors", save(params), lambda root: (
            stars.load_weights(root / "w.safetensors", "resnet20")), is_network)
    with contextlib.suppress(ImportError):
        import PIL.Image
        tiny = tiny_files()[0]
        files["tiny-imagenet labels"] = txt, tiny[txt], load("tiny-imagenet"), is_data_set
        files["tiny-imagenet .JPEG"] = jpg, tiny[jpg], load("tiny-imagenet"), is_data_set
    return files, cifar | tiny

@pytest.mark.filterwarnings("ignore")
def test_torture_any_change_of_a_file_is_read_or_refused(small, tmp_path):
    files, others = valid_files()
    for kind, (name, valid, load, check) in files.items():
        write_folder(tmp_path, others)
        counts = collections.Counter()

        @settings(max_examples=2000 if TORTURE else 50)
        @given(EDITS, st.sampled_from([None, *valid] if isinstance(valid, dict) else [None]))
        def damaged(edits, member):  # the file, or what is in it where checksums are right
            if isinstance(valid, dict):
                raw = npz(valid | {member: edited(valid[member], edits)} if member else valid)
            else:
                raw = valid
            (tmp_path / name).write_bytes(raw if member else edited(raw, edits))
            def read():
                try:
                    check(load(tmp_path))
                    counts["read"] += 1
                except stars.UserError as error:
                    assert str(error).isprintable() and len(str(error)) < 1200, str(error)
                    counts["refused"] += 1
            start = time.monotonic()
            assert peak_memory(read) < 2 ** 25 and time.monotonic() - start < 10
        (tmp_path / name).write_bytes(npz(valid) if isinstance(valid, dict) else valid)
        check(load(tmp_path))
        damaged()
        assert counts["refused"] > counts.total() / 10
        CLOSING.append(f"damaged {kind}: {counts.total()} inputs, {counts['refused']} refused, "
                       f"{counts['read']} read, 0 lost")

def test_safetensors(tmp_path, monkeypatch):
    path, params = str(tmp_path / "w.safetensors"), some_params()
    Path(path).touch()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors", None)
        refused("pip install safetensors", stars.load_weights, path, "resnet20")
    save = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file
    save({"module." + n: a for n, a in params.items()}, path, {"info": '{"arch": "resnet20"}'})
    got, info = stars.load_weights(path, classes=10)
    assert info == {"arch": "resnet20", "classes": 10}
    assert got.keys() == params.keys() and all((got[n] == params[n]).all() for n in params)
    whole = Path(path).read_bytes()
    for data in (b"", whole[:-1], whole[:20], b"\xff" * 100, whole[:8] + b"{" * 50 + whole[58:]):
        Path(path).write_bytes(data)
        refused("w.safetensors cannot be read", stars.load_weights, path, "resnet20")

# ---- 11  The command line ------------------------------------------------------------------------

GIVEN = ["--mean", ".5,.5,.5", "--std", ".2,.2,.2", "--size", "32"]
TINY = ["--epochs", "2", "--warm-up", "1", "--synthesis-steps", "2", "--distill-steps", "2",
        "--batch", "8", "--generator-width", "4", "--z-dim", "4", "--quiet"]

RUN = ["--dataset", "cifar10", "--teacher", "teacher.npz", *TINY]

def run(capsys, *argv):
    """Exit code of stars.py, its stdout and stderr."""
    code = stars.main([str(a) for a in argv])
    return code, *capsys.readouterr()

def told(capsys, *argv):
    """What a command that succeeds tells as JSON."""
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])

def rows_of(run_folder):
    return [json.loads(line) for line in open(f"{run_folder}/metrics.jsonl")]

def put_npz(path, n=20, classes=10):
    """A data set of n random images, the same to train and to test on -> images."""
    x, y = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n)
    np.savez(path, x_train=x, y_train=y % classes, x_test=x, y_test=y % classes)
    return x

def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

DRAW = stars.draw

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in, holding only a teacher of CIFAR-10's shape: teacher.npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stars, "draw", lambda *_: None)  # would take most of the time of tiny runs
    monkeypatch.setattr(stars, "THREADS", 1)  # as tiny runs wait for their threads
    params = stars.init_weights(stars.weight_shapes("resnet8", 10, 4), np.random.default_rng(0))
    stars.save_weights("teacher.npz", params, dict(arch="resnet8", classes=10))
    return tmp_path

def distil(capsys, *more):
    return run(capsys, *RUN, *more)

def put_cifar10(folder, monkeypatch, n=50):
    """A test set of CIFAR-10's form with n random images in folder/data."""
    monkeypatch.setitem(stars.DATASETS, "cifar10", stars.DATASETS["cifar10"]._replace(test=n))
    path = folder / "data" / "cifar-10-batches-bin"
    path.mkdir(parents=True)
    records = np.random.default_rng(0).integers(0, 256, (n, 3073), np.uint8)
    records[:, 0] %= 10
    (path / "test_batch.bin").write_bytes(records.tobytes())

@pytest.mark.parametrize("more", ("", "--synthesis pixels --student-arch vgg11 --width 4 --T 1 "
                                      "--surrogate atan"))
def test_a_run_keeps_the_arrays_of_the_gpu_apart(folder, monkeypatch, capsys, more):
    put_cifar10(folder, monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", CuPy())
    monkeypatch.setattr(stars, "xp", np)  # which it will be again
    monkeypatch.setattr(stars, "_compiled", functools.lru_cache(stars._compiled.__wrapped__))
    monkeypatch.setattr(stars, "gpu_address", lambda a: a.a.ctypes.data)
    rows = []
    for device in ("gpu", "cpu"):
        assert distil(capsys, *more.split(), "--device", device, "--out", device)[0] == 0
        rows.append(rows_of(device)[0])
    assert rows[0].keys() == rows[1].keys() > {"bn", "tar", "grad_bn"}
    for name in rows[0].keys() - {"seconds", "warnings"}:  # in later rows spikes flip
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3, abs=1e-6), name
    assert run(capsys, "eval", "gpu/student.npz", "--dataset", "cifar10", "--device", "gpu")[0] == 0

def test_the_student_is_the_same_with_and_without_a_test_set(folder, capsys, monkeypatch):
    monkeypatch.setitem(stars.DATASETS, "cifar10", stars.DATASETS["cifar10"]._replace(
        url="http://127.0.0.1:9/none.tar.gz"))
    row = told(capsys, *RUN, "--out", "without", "--download")
    assert row["accuracy"] is None and 0 <= row["agreement"] <= 1
    put_cifar10(folder, monkeypatch)
    row = told(capsys, *RUN, "--out", "with")
    assert 0 <= row["accuracy"] <= 1 and row["n"] == 50
    assert digest(folder / "with/student.npz") == digest(folder / "without/student.npz")
    again = told(capsys, "eval", "with/student.npz", "--dataset", "cifar10")
    assert again["accuracy"] == row["accuracy"]

def test_a_run_leaves_its_folder_and_its_json(folder, capsys):
    row = told(capsys, *RUN)
    assert set(row) >= {"accuracy", "agreement", "teacher_accuracy", "seeds", "method", "schedule",
                        "device", "seconds", "student"}
    run_folder = folder / "runs/cifar10-stars-s0"
    for name in ("config.json", "metrics.jsonl", "student.npz", "summary.json", "checkpoint.npz"):
        assert (run_folder / name).stat().st_size
    assert len(rows_of(run_folder)) == 2
    again = told(capsys, "--resume", run_folder)  # tells the seconds of all epochs
    assert again["seconds"] == row["seconds"] > 0
    distil(capsys)
    assert (folder / "runs/cifar10-stars-s0-2/student.npz").exists()

def test_a_run_draws_its_images_and_its_losses(folder, capsys, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(stars, "draw", DRAW)
    assert distil(capsys, "--out", "run")[0] == 0
    images, pool = image.imread("run/synthetic.png")[::2, ::2, :3], pool_of(folder / "run")
    rows = [np.concatenate([*batch], 1) for batch in pool]  # of images twice as large, a batch each
    assert np.array_equal(np.rint(255 * images), np.concatenate(rows))
    assert image.imread("run/curves.png")[..., :3].std() > 0.01  # not blank

def test_the_student_has_a_batch_of_its_own(folder, capsys, monkeypatch):
    shapes, step = [], stars.distillation_step
    monkeypatch.setattr(stars, "distillation_step", lambda student, state, x, *rest: (
        shapes.append(x.shape), step(student, state, x, *rest))[1])
    assert distil(capsys, "--distill-batch", "4", "--out", "r")[0] == 0
    assert shapes == [(4, 32, 32, 3)] * 2 and len(pool_of(folder / "r")) == 4
    assert [row["images_seen"] for row in rows_of("r")] == [0, 8]
    for given, schedule, own in ((dict(init="teacher"), "quick", 64), (dict(batch=8), "quick", 8),
                                 (dict(init="random"), "scratch", 16),
                                 (dict(init="random", batch=8), "scratch", 8),
                                 (dict(init="random", schedule="quick"), "quick", 64)):
        c = stars.settle(stars.Config(**dict(init="teacher") | given))
        assert (c.schedule, c.distill_batch) == (schedule, own)
    code, _, err = distil(capsys, "--distill-batch", "1")
    assert code == 1 and "--distill-batch must be 2 or more" in err

def test_the_table_has_a_row_for_each_method_and_seed(folder, capsys):
    table = told(capsys, *RUN, "--method", "all", "--seeds", "2", "--T", "1")["rows"]
    assert [(row["method"], *row["seeds"]) for row in table] == [
        (m, s) for s in (0, 1) for m in ("bn", "bn+rca", "bn+tar", "stars")]

@pytest.fixture
def ctrl_c():
    """Ctrl-C is Python's own, whatever made the tests run and whatever a run leaves."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)

def interrupt(*_):
    raise KeyboardInterrupt

@pytest.mark.parametrize("shell, code", [
    ("PYTHONIOENCODING=ascii {} --out 'é dir' --quiet", 0), ("{} --out closed 2>&-", 0),
    ("{} --out closed --quiet >&-", 0), ("{} --out full --json --quiet > /dev/full", 1)])
def test_what_the_terminal_does_not_take_ends_no_run(folder, shell, code):
    if code and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = shlex.join([sys.executable, stars.__file__, *RUN[:-1]])
    done = subprocess.run(shell.format(command), shell=True, text=True, stderr=subprocess.PIPE)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert len([*folder.glob("*/summary.json")]) == 1 and ("No space" in done.stderr) == code

def test_ctrl_c_in_a_table_says_what_goes_on(folder, capsys, monkeypatch, ctrl_c):
    monkeypatch.setattr(stars, "synthesis_step", interrupt)
    code, _, err = run(capsys, *RUN[:-1], "--method", "all")
    assert code == 130 and "--resume runs/cifar10-bn-s0 (with this run alone)" in err
    assert "resnet8 -> spiking resnet8" in err.splitlines()[0]  # told before the first step

def pool_of(run_folder):
    return np.fromfile(run_folder / "pool.bin", np.uint8).reshape(-1, 8, 32, 32, 3)

def test_method_real_takes_its_images_from_the_training_set(folder, capsys):
    code, _, err = distil(capsys, "--method", "real", "--out", "with")
    assert code == 1 and "cifar10 is not in data" in err and not Path("with").exists()
    x, y, mine = put_npz("mine.npz"), np.arange(20) % 10, ("--dataset", "mine.npz", *GIVEN)
    row = told(capsys, *RUN, "--method", "real", *mine, "--out", "with")
    assert row["n"] == 20 and row["agreement"] is None  # no image of the pool is held out
    known = {image.tobytes() for image in x}
    images = {image.tobytes() for batch in pool_of(folder / "with") for image in batch}
    assert images <= known and len(images) > 10
    np.savez("mine.npz", x_train=x.repeat(2, 1).repeat(2, 2), y_train=y)
    code, _, err = distil(capsys, "--method", "real", *mine)
    assert code == 1 and "mine.npz cannot be read" in err and "x_train (N,32,32,3)" in err
    np.savez("mine.npz", x_test=x.repeat(2, 1).repeat(2, 2), y_test=y)
    assert told(capsys, *RUN, "--method", "bn", *mine)["accuracy"] is None

def test_the_accuracy_that_a_teacher_says_is_of_its_own_data_set(folder, capsys):
    np.savez("mine.npz", x_train=np.zeros((20, 32, 32, 3), np.uint8), y_train=np.arange(20) % 10)
    for known, said in ("mine.npz", 0.5), ("other.npz", None):
        params, info = stars.load_weights("teacher.npz")
        stars.save_weights("teacher.npz", params, info | dict(accuracy=0.5, dataset=known))
        assert told(capsys, *RUN, "--dataset", "mine.npz", *GIVEN)["teacher_accuracy"] == said

def test_the_first_half_of_the_warm_up_is_not_distilled_on(folder, capsys, monkeypatch):
    seen, crops = [], stars.crops
    measured, evaluate = [], stars.evaluate
    monkeypatch.setattr(stars, "crops", lambda rng, x: (seen.extend(x.copy()), crops(rng, x))[1])
    monkeypatch.setattr(stars, "evaluate", lambda net, x, *more: (measured.append(x),
                                                                  evaluate(net, x, *more))[1])
    assert distil(capsys, "--epochs", "5", "--warm-up", "3", "--distill-steps", "20", "--T", "1",
                  "--out", "run")[0] == 0
    pool, seen = pool_of(folder / "run"), {image.tobytes() for image in seen}
    used = [[image.tobytes() in seen for image in batch] for batch in pool]
    assert not np.any(used[:2]) and np.all(np.any(used[2:], 1))  # 2 batches an epoch
    assert not np.any(used, 0)[0]  # the first of each batch is held out
    assert np.array_equal(measured[-1], pool_of(folder / "run")[2:, 0])

def test_the_gradient_goes_through_the_reset_if_a_converted_student_has_many_steps(folder, capsys):
    for i, (more, detached) in enumerate((
            (("--T", "4"), True), (("--T", "5"), False), (("--T", "5", "--init", "random"), True),
            (("--T", "5", "--reset-gradient", "no"), True),
            (("--T", "2", "--reset-gradient", "yes"), False))):
        assert distil(capsys, *more, "--out", str(i))[0] == 0
        net, info = stars.load_net(stars.Config(), f"{i}/student.npz")
        assert net.activation.detach_reset == info["neuron"]["detach_reset"] == detached

def test_a_run_that_is_all_warm_up_converts_the_teacher(folder, capsys):
    convert = ("--warm-up", "2", "--T", "3", "--quantile", "0.9", "--out", "run")
    assert distil(capsys, *convert)[0] == run(capsys, "--resume", "run")[0] == 0
    params, info = stars.load_weights("run/student.npz")
    net, _ = stars.load_net(stars.Config(), "teacher.npz")
    seen, images = {}, pool_of(folder / "run")[-1]
    stars.predict(net, images, watch=lambda layer, z: seen.update({layer: np.quantile(
        z.ravel()[::7], 0.9)}))
    assert seen and info["T"] == 3
    for layer, V in seen.items():
        assert params.pop(layer + ".v_th") == params.pop(layer + ".amplitude") == np.float32(V)
    assert params.keys() == net.params.keys()
    assert all(np.array_equal(v, net.params[k]) for k, v in params.items())

def test_a_student_is_as_wide_as_the_teacher_unless_told(folder, capsys):
    shape = stars.load_weights("teacher.npz")[0]["conv1.weight"].shape
    for more, width in ((), shape[0]), (("--width", "3"), 3), (("--student-arch", "resnet8"), 16):
        assert distil(capsys, *more, "--T", "1", "--out", f"w{width}")[0] == 0
        params, info = stars.load_weights(f"w{width}/student.npz")
        assert params["conv1.weight"].shape == (width, 3, 3, 3) and shape[0] not in (3, 16)
        assert stars.load_net(stars.Config(), f"w{width}/student.npz")[1] == info
        started = json.loads(Path(f"w{width}/config.json").read_text())
        assert (started["init"], started["lr"]) == (
            ("random", 0.1) if more else ("teacher", 0.01)) and ("bn1.v_th" in params) == (not more)
    partly = ("--width", "3", "--init", "teacher")  # the teacher's thresholds fit no layer
    assert distil(capsys, *partly, "--out", "partly")[0] == 0
    assert "bn1.v_th" not in stars.load_weights("partly/student.npz")[0]

def test_a_student_has_the_projections_of_its_teacher(folder, capsys):
    shapes = stars.weight_shapes("resnet8", 10, 4, True)
    stars.save_weights("teacher.npz", stars.init_weights(shapes, np.random.default_rng(0)),
                       dict(arch="resnet8", classes=10))
    for width in "4", "3":
        assert distil(capsys, "--width", width, "--out", width)[0] == 0
        assert "layer2.0.shortcut.0.weight" in stars.load_weights(f"{width}/student.npz")[0]
    assert json.loads(Path("4/config.json").read_text())["init"] == "teacher"

def test_a_saved_network_holds_the_command_that_made_it(folder, capsys):
    Path("teacher.npz").rename("my teacher.npz")
    net, _ = stars.load_net(stars.Config(), "my teacher.npz")
    c = stars.Config(teacher="my teacher.npz", tf32=True, w_rca=3.5, mean="0,1,2")
    stars.save_net("net.npz", net, c, "distill", "resnet8", 10)
    command = shlex.split(stars.load_weights("net.npz")[1]["command"])
    assert command[:2] == ["python", "stars.py"]
    assert stars.Config(**stars.parse(command[2:])[1]) == c

# A run of a second or two, long enough to disturb: 49,152 bytes of images an epoch, a checkpoint
# of 81,872 bytes after the first, of 110,512 when it has a student, and some more each time
SMALL = ("--epochs", "5", "--seed", "3", "--z-dim", "8")

def start(*argv, **options):
    """stars.py in a process of its own."""
    return subprocess.Popen([sys.executable, stars.__file__, *argv], text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)

def small_run(*more):
    return [*RUN, *SMALL, *more]

@functools.lru_cache(None)
def undisturbed():
    """Digest of the student of the small run that nothing disturbed, and its seconds."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stars, "THREADS", 2)
        assert stars.main(small_run("--out", "whole")) == 0
    return digest(Path("whole/student.npz")), time.monotonic() - began

def after_epochs(folder, n):
    """Wait until the run in folder has written n lines of metrics."""
    until, path = time.monotonic() + 120, folder / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= n):
        assert time.monotonic() < until
        time.sleep(0.01)

def test_torture_killed_runs_go_on_to_the_same_student(folder, capsys):
    kills, rng, same, inside = 50 if TORTURE else 2, np.random.default_rng(), 0, 0
    whole, took = undisturbed()
    for k in range(kills):
        out = folder / f"cut{k}"
        process = start(*small_run("--out", f"cut{k}", "--threads", "1"))
        while k % 5 != 1 and not (out / "config.json").exists():
            time.sleep(0.01)  # four of five when work has begun
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, took * (0.5 if k % 5 != 1 else 1)))
        process.kill()
        process.communicate()
        with contextlib.suppress(FileNotFoundError):  # as if it had been writing
            (out / "checkpoint.npz-01234567.tmp").write_bytes(b"half")
        begun = (out / "config.json").exists()
        inside += begun and process.returncode < 0
        again = ["--resume", f"cut{k}", "--quiet"] if begun else small_run("--out", f"cut{k}")
        assert run(capsys, *again)[0] == 0
        same += digest(out / "student.npz") == whole
        assert not begun or not [*out.glob("*.tmp")]
        assert len(rows_of(out)) == 5
    CLOSING.append(f"{kills} kills ({inside} inside a run), {same} identical students")
    assert same == kills

def test_a_folder_has_one_run_at_work(folder, capsys, monkeypatch):
    pytest.importorskip("fcntl")
    beside, left = [], Path("one/student.npz-01234567.tmp")
    def draw(*_):
        left.write_bytes(b"of the run at work")
        if len(beside) < 2:
            beside.append(run(capsys, "--resume", "one"))
        assert left.exists()
    with monkeypatch.context() as patch:
        patch.setattr(stars, "draw", draw)
        assert distil(capsys, "--out", "one")[0] == run(capsys, "--resume", "one")[0] == 0
    assert [(code, err.splitlines()[-1]) for code, _, err in beside] == 2 * [
        (1, "stars.py: another process is at work in one: wait for it, or end it")]
    assert run(capsys, "--resume", "one")[0] == 0 and not left.exists()

def test_two_runs_that_begin_at_once_do_not_share_a_folder(folder, monkeypatch):
    new = lambda: stars.run_folder(stars.Config(), "distill", "race")
    with new():
        monkeypatch.setattr(os.path, "exists", lambda path: False)  # neither has seen the other's
        with pytest.raises(stars.UserError, match="runs/race cannot be a new folder"), new():
            pass

def test_a_new_run_leaves_the_files_of_others_alone(folder, capsys):
    Path("here").mkdir()
    for name in "notes.tmp", "config.json-01234567.tmp":  # the second of a run that was killed
        Path("here", name).write_text(name)
    assert distil(capsys, "--out", "here")[0] == 0
    assert [path.name for path in Path("here").glob("*.tmp")] == ["notes.tmp"]

def test_ctrl_c_ends_with_the_command_that_goes_on(folder):
    process = start(*small_run("--out", "a folder"), preexec_fn=lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL))  # a shell makes a job in the background ignore it
    after_epochs(folder / "a folder", 2)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert len(rows_of("a folder")) < 5
    command = shlex.split(err.split("to go on: ")[1].strip())
    assert command[0] == "python" and command[2:] == ["distill", "--resume", "a folder"]
    assert subprocess.run([sys.executable, *command[1:]], stdout=subprocess.DEVNULL).returncode == 0
    assert digest(folder / "a folder/student.npz") == undisturbed()[0]

def test_ctrl_c_waits_for_a_file_that_is_being_written(tmp_path, ctrl_c):
    def content(file):
        time.sleep(0.2)  # until the main thread waits
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal sends it
        time.sleep(0.2)
        file.write(b"whole")
    with pytest.raises(KeyboardInterrupt):
        stars.write_atomic(tmp_path / "file", content)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stars.write_atomic(tmp_path / "file", content)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    stars._pool.submit(stars.write_atomic, tmp_path / "file", b"by a thread").result()

def test_ctrl_c_twice_ends_at_once(folder, capsys, monkeypatch, ctrl_c):
    with monkeypatch.context() as patch:
        patch.setattr(stars, "synthesis_step", interrupt)
        code, _, err = distil(capsys, "--out", "cut")
    assert code == 130 and "--resume cut" in err
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert run(capsys, "--resume", "cut")[0] == 0  # there was no checkpoint yet

def test_a_full_disk_leaves_what_was_there(folder, capsys):
    """One run on a disk that is full at its first checkpoint, at its second, at its last images."""
    resource, go_on = pytest.importorskip("resource", reason="no file size limits here"), []
    for limit, epochs in (65_000, 0), (100_000, 1), (230_000, 4):
        process = start(*go_on or small_run("--out", "full"), preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)))
        err = process.communicate()[1]
        assert process.returncode == 1 and "make room" in err and "Traceback" not in err
        assert not [name for name in os.listdir("full") if name.endswith(".tmp")]
        assert ("pool.bin" in err or "--resume full" in err) if epochs == 4 else (
            "checkpoint.npz" in err)
        assert os.path.exists("full/checkpoint.npz") == (epochs > 0)
        if epochs:
            rows = json.loads(str(np.load("full/checkpoint.npz")["info"]))["rows"]
            assert len(rows) == epochs
        go_on = ["--resume", "full", "--quiet"]
    assert run(capsys, *go_on)[0] == 0
    assert digest(folder / "full/student.npz") == undisturbed()[0]

def test_a_checkpoint_of_another_run_is_refused_with_what_differs(folder, capsys, monkeypatch):
    for name, more in ("a", ["--seed", "1"]), ("b", ["--seed", "2", "--tau-kd", "3"]):
        assert distil(capsys, *more, "--out", name)[0] == 0
    code, _, err = run(capsys, "--resume", "a", "--seed", "2")
    assert code == 1 and "seed was 1, not 2" in err
    before = digest(folder / "a/student.npz")
    assert run(capsys, "--resume", "a", "--seed", "1", "--threads", "1")[0] == 0  # says the same
    own = (folder / "a/checkpoint.npz").read_bytes()
    (folder / "a/checkpoint.npz").write_bytes((folder / "b/checkpoint.npz").read_bytes())
    code, _, err = run(capsys, "--resume", "a")
    assert code == 1 and "seed was 2, not 1; tau_kd was 3.0, not 4.0" in err
    (folder / "a/checkpoint.npz").write_bytes(own[:-1000])
    assert run(capsys, "--resume", "a")[0] == 1
    np.savez("a/checkpoint.npz", **dict([*np.load(io.BytesIO(own)).items()][1:]))
    code, _, err = run(capsys, "--resume", "a")
    assert code == 1 and "arrays are missing" in err
    (folder / "a/checkpoint.npz").write_bytes(own)
    os.truncate(folder / "a/pool.bin", 100)
    code, _, err = run(capsys, "--resume", "a")
    assert code == 1 and "pool.bin" in err and "start a new run" in err
    with monkeypatch.context() as patch:  # between two epochs
        count, whole = itertools.count(), stars.symptoms
        patch.setattr(stars, "symptoms",
                      lambda *args: interrupt() if next(count) == 1 else whole(*args))
        assert distil(capsys, "--out", "c")[0] == 130
    os.truncate(folder / "c/pool.bin", 100)
    for _ in range(3):
        code, _, err = run(capsys, "--resume", "c")
        assert code == 1 and "c/pool.bin is too short: start a new run" in err
    with monkeypatch.context() as patch:
        patch.setattr(stars, "VERSION", 0)
        code, _, err = run(capsys, "--resume", "b")
        patch.undo()
        assert code == 1 and f"version was {stars.VERSION}, not 0" in err
    params, info = stars.load_weights("teacher.npz")
    for changed in (params | {"linear.bias": np.ones(10, "f4")}, info), (params, info | dict(
            mean=[.1, .2, .3])):
        stars.save_weights("teacher.npz", *changed)
        code, _, err = run(capsys, "--resume", "b")
        assert code == 1 and "inputs was" in err and digest(folder / "a/student.npz") == before

def test_another_number_of_threads_gives_the_same_files(folder, capsys, monkeypatch):
    monkeypatch.setattr(stars, "THREADS", 1)
    for threads in ("1", "2", "5"):
        assert distil(capsys, "--out", threads, "--threads", threads, "--batch", "24")[0] == 0
    assert len({digest(folder / f"{n}/student.npz") for n in "125"}) == 1

def test_a_teacher_is_trained_from_a_file_and_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    put_npz("set.npz", 40, 2)
    flags = ("teacher", "--dataset", "set.npz", "--arch", "resnet8", "--batch", "8",
             "--epochs", "2", "--width", "6", "--quiet")
    path = told(capsys, *flags, "--out", "a")["teacher"]
    params, info = stars.load_weights(path)
    assert info["classes"] == 2 and len(params["conv1.weight"]) == 6
    steps, whole_step = itertools.count(1), stars.classification_step

    def interrupted_at_the_eighth(*args):
        if next(steps) == 8:
            raise KeyboardInterrupt
        return whole_step(*args)
    with monkeypatch.context() as patch:
        patch.setattr(stars, "classification_step", interrupted_at_the_eighth)
        assert run(capsys, *flags, "--out", "b")[0] == 130
    again = told(capsys, "teacher", "--resume", "b", "--quiet")["teacher"]
    assert digest(folder / again) == digest(folder / path)

def test_a_student_needs_no_data_set(folder, capsys, monkeypatch):
    code, out, err = run(capsys, "--dataset", "none", "--teacher", "teacher.npz", *GIVEN,
                         "--size", "64", "--T", "1", *TINY[:-1], "--json")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and row["accuracy"] is None and 0 <= row["agreement"] <= 1
    assert "no accuracy can be measured: no data set was named" in err
    assert os.path.getsize("runs/none-stars-s0/pool.bin") == 2 * 2 * 8 * 64 * 64 * 3
    for size, code in (64, 0), (32, 1):
        np.savez("set.npz", x_test=np.zeros((4, size, size, 3), np.uint8), y_test=np.arange(4))
        found = run(capsys, "eval", row["student"], "--dataset", "set.npz")
        assert found[0] == code and ("images x_test (N,64,64,3)" in found[2]) == code

def test_a_public_checkpoint_evaluates(folder, capsys, monkeypatch):
    put_cifar10(folder, monkeypatch)
    params, _ = stars.load_weights("teacher.npz")
    public = {"module." + k.replace("linear", "fc"): v for k, v in params.items()}
    np.savez("public.npz", **public, **{"module.bn1.num_batches_tracked": np.array(7)})
    flags = ("--dataset", "cifar10", "--arch", "resnet8")
    assert told(capsys, "eval", "teacher.npz", *flags) == told(capsys, "eval", "public.npz", *flags)
    stars.save_weights("blind.npz", params, dict(arch="resnet8", dataset="none"))
    assert run(capsys, "eval", "blind.npz", *flags)[0] == 0

FAILURES = [  # arguments, what the sentence says
    (["--teacher", "none.npz"], "none.npz"),
    (["--teacher", "teacher.npz", "--arch", "vgg11"], "resnet8"),
    (["--teacher", "teacher.npz", "--dataset", "cifar100"], "classes 10, not 100"),
    (["--teacher", "spiking.npz"], "spiking"),
    (["--teacher", "renamed.npz"], "conv9.weight"),
    (["--teacher", "headless.npz", "--arch", "vgg11"], "linear layer"),
    (["--teacher", "teacher.npz", "--mean", "1,2"], "--mean"),
    (["--teacher", "teacher.npz", "--std", "0,1,1"], "its std is 0.0,1.0,1.0"),
    (["--teacher", "teacher.npz", "--mean", "0,nan,0"], "its mean is 0.0,nan,0.0"),
    (["--teacher", "teacher.npz", "--out", "full"], "full cannot be a new folder (File exists)"),
    (["--teacher", "teacher.npz", "--out", "teacher.npz"], "teacher.npz cannot be a new folder"),
    (["--teacher", "teacher.npz", "--out", "."], ". cannot be a new folder (File exists)"),
    (["--resume", "typed"], "what it says of epochs, lam, surrogate cannot be"),
    (["--arch", "resnet56"], "shipped"),
    (["--resume", "none"], "none"),
    (["--teacher", "teacher.npz", "--epochs", "2", "--warm-up", "3"], "--epochs 2"),
    (["--teacher", "teacher.npz", "--epochs", "1"], "--epochs 1 must be more than --warm-up 1"),
    (["--teacher", "teacher.npz", "--epochs", "2", "--warm-up", "2", "--init", "random"],
     "--epochs 2"),
    (["--teacher", "teacher.npz", "--batch", "1"], "--batch"),
    (["teacher", "--resume", "full"], "full"),
    (["eval", "teacher.npz", "--T", "2"], "--T"),
    (["eval", "negative.npz"], "a v_th or amplitude is not positive"),
    (["--teacher", "thresholds.npz"], "an ANN has no v_th"),
    (["--teacher", "large.npz"], "size 64, not 32"),
    (["--teacher", "large.npz", "--dataset", "none", *GIVEN], "--size must be 64 here, not 32"),
    (["--teacher", "teacher.npz", "--size", "64"], "--size must be 32 here, not 64"),
    (["--teacher", "teacher.npz", "--dataset", "none", *GIVEN[:4]], "add --size 32 or 64"),
    (["bench", "--batch", "1"], "--batch must be 2 or more"),
    (["--teacher", "teacher.npz", "--dataset", "none"], "its mean is not known"),
    (["teacher", "--dataset", "none"], "no data set was named"),
    (["--dataset", "none"], "is not shipped, but"),
    (["--device", "gpu"], "no usable GPU"),
    (["eval", "teacher.npz"], "cifar10 is not in data"),
    (["teacher", "--dataset", "cifar10"], "cifar10 is not in data")]

@pytest.mark.parametrize("argv, sentence", FAILURES)
def test_an_expected_failure_is_one_sentence(folder, capsys, monkeypatch, argv, sentence):
    params, info = stars.load_weights("teacher.npz")
    stars.save_weights("spiking.npz", params, info | dict(neuron=dict(lam=0.5), T=2))
    stars.save_weights("negative.npz", params | {"bn1.v_th": -1.0}, info | dict(neuron={}))
    stars.save_weights("thresholds.npz", params | {"bn1.v_th": 1.0}, info)
    stars.save_weights("large.npz", params, info | dict(size=64))
    np.savez("headless.npz", **{f"classifier.{k}.weight": np.ones((2, 2)) for k in (3, 6)})
    params["conv9.weight"] = params.pop("conv1.weight")
    stars.save_weights("renamed.npz", params, info)
    (folder / "full").mkdir()
    (folder / "full/config.json").write_text("{}")
    (folder / "typed").mkdir()
    (folder / "typed/config.json").write_text(json.dumps(
        dict(command="distill", version=stars.VERSION, epochs="2", surrogate="x", lam=2.0)))
    code, _, err = run(capsys, *argv, "--quiet")
    assert code == 1 and sentence in err and err.count("\n") == 1 and "Traceback" not in err

@pytest.mark.parametrize("argv, sentence", [
    ("--T 0", "--T must be 1 to 1000, not 0"), ("--T -1", "--T must be"), ("--T 1.5", "--T"),
    ("--lr inf", "--lr must be"), ("--v-init inf", "--v-init must be"), ("--T 1001", "--T must be"),
    ("--z-dim " + 20 * "9", "--z-dim must be"), ("--generator-width 1", "--generator-width must"),
    ("--batch -3", "--batch must be"), ("--lr nan", "--lr must be"), ("--lr 0", "--lr must be"),
    ("--seeds 0", "--seeds must be"), ("--tau-kd 0", "--tau-kd must be"), ("--w-bn -1", "--w-bn"),
    ("--quantile 2", "--quantile must be 0 to 1"), ("--lam 1.1", "--lam must be 0 to 1"),
    ("--out a --seeds 2", "--out needs"), ("--out a --resume b", "--out needs"),
    ("--method bn --w-rca 5", "--w-rca needs"),
    ("--method real --synthesis pixels", "--synthesis needs a --method that makes images"),
    ("--method bn+rca --w-tar 5", "--w-tar needs"), ("--w-rate -1", "--w-rate must be"),
    ("--method bn_rca", "--method must be one of bn, bn+rca, bn+tar, stars, real, all, not bn_rca"),
    ("--arch resnet-20", "--arch must be one of resnet8, resnet14, resnet20"),
    ("--dataset none.npz", "no data set 'none.npz'"), ("--device cup", "auto, cpu, gpu, not cup"),
    ("--nothing", "unrecognized arguments: --nothing"), ("bench --teacher x", "--teacher x"),
    ("distil", "no command distil: use distill, teacher, eval, bench"),
    ("eval", "required: file"), ("eval a b", "unrecognized arguments: b")])
def test_wrong_usage_ends_with_code_2(capsys, argv, sentence):
    with pytest.raises(SystemExit) as end:
        stars.main(argv.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and sentence in err.split("error:")[1] and "Traceback" not in err

def test_a_loss_that_is_not_finite_ends_the_run(folder, capsys, monkeypatch):
    steps, whole = itertools.count(1), stars.distillation_loss
    def third_is_nan(t, s, tau):
        loss, back = whole(t, s, tau)
        scale = np.nan if next(steps) == 4 else 1  # of the gradient, so of the weights, too
        return loss * scale, lambda dloss=1.0: back(dloss) * scale
    monkeypatch.setattr(stars, "distillation_loss", third_is_nan)
    code, _, err = distil(capsys, "--out", "a", "--epochs", "3")
    assert code == 1 and "student_kd became nan in epoch 3, step 2: lower the learning rate" in err
    assert "a/checkpoint.npz holds the state after epoch 2" in err
    assert json.loads(str(np.load("a/checkpoint.npz")["info"]))["rows"][-1]["epoch"] == 2
    err = start(*small_run("--lr", "1e6", "--quiet")).communicate()[1]
    assert err.count("\n") == 1 and "became" in err  # and NumPy says nothing

def test_a_weight_that_is_not_finite_is_not_saved(folder, capsys, monkeypatch):
    whole = stars.distillation_step
    def spoil(student, *args):
        loss = whole(student, *args)
        student.params["bn1.running_var"][0] = np.inf  # its neurons fall silent, the loss is finite
        return loss
    monkeypatch.setattr(stars, "distillation_step", spoil)
    code, _, err = distil(capsys, "--out", "a")
    assert code == 1 and "student/bn1.running_var became inf in epoch 2" in err
    assert np.isfinite(np.load("a/checkpoint.npz")["generator/fc.weight"]).all()

def test_collapse_and_silent_layers_are_noticed(folder, capsys, monkeypatch):
    teacher, x = stars.Net(stars.load_weights("teacher.npz")[0]), np.random.default_rng(0)
    x = x.integers(0, 256, (64, 32, 32, 3), np.uint8)
    assert stars.symptoms(teacher, x * 0 + 128, {"bn1": .1})[1:] == [
        "the synthetic images are all the same, or have no content"]
    assert "no content" in str(stars.symptoms(teacher, x[:1].repeat(9, 0), {}))
    assert "no content" in str(stars.symptoms(teacher, 0 * x + x[:, :1, :1], {}))
    assert "no content" not in str(stars.symptoms(teacher, x, {}))
    weights = teacher.params | {"linear.weight": np.eye(10, 16, dtype="f4") * 0,
                                "linear.bias": np.eye(10, dtype="f4")[7]}
    assert stars.symptoms(stars.Net(weights), x, {"bn1": 0, "bn2": .1}) == [
        "no neuron of bn1 ever fires", "nearly all synthetic images are class 7"]
    whole = stars.first_student
    monkeypatch.setattr(stars, "first_student", lambda *args: whole(*args) | {
        "layer2.0.bn1.v_th": 1e9})
    code, _, err = distil(capsys, "--out", "a", "--epochs", "4")
    assert code == 0 and err.count("layer2.0.bn1 ever fires") == 1
    said = ["no neuron of layer2.0.bn1 ever fires" in str(row["warnings"]) for row in rows_of("a")]
    assert said == [False, True, True, True]

@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 TiB"), MemoryError()])
def test_out_of_memory_is_one_sentence(folder, capsys, monkeypatch, error):
    def full(*_):
        raise error
    monkeypatch.setattr(stars, "synthesis_step", full)
    code, _, err = distil(capsys, "--out", "a")
    assert code == 1 and (str(error) or "out of memory") in err and err.count("\n") == 1

def test_multiply_adds_are_those_of_the_layers():
    net = stars.Net({k: np.ones(shape, "f4") for k, shape in
                     stars.weight_shapes("resnet8", 10, 4).items()})
    sizes = [(16, 3, 4), (16, 4, 4), (16, 4, 4), (8, 4, 8), (8, 8, 8), (4, 8, 16), (4, 16, 16)]
    first, *others = (9 * side * side * c * k for side, c, k in sizes)
    assert stars.macs(net, 16) == first + sum(others) + 160
    assert stars.macs(net._replace(T=3), 16) == first + 3 * sum(others) + 160

def test_progress_is_told(folder, capsys, monkeypatch):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(stars, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    _, _, piped = run(capsys, *RUN[:-1])
    assert "resnet8 -> spiking resnet8" in piped.splitlines()[0] and "\r" not in piped
    assert re.search(r"epoch 1/2  warm-up 1 of 2, .* s each, [\d.]+ min left\n", piped)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, _, seen = run(capsys, *RUN[:-1])
    for kind in ("warm-up", "synthesis", "distillation"):
        assert re.search(rf"\r\x1b\[Kepoch \d/2  {kind} 2 of 2, .* s each, .* left(?!\n)", seen)
    assert len(re.findall("epoch ./2 .*agreement.* left\\)\n", seen)) == 1
    assert "epoch" not in distil(capsys)[2]

def test_bench_reports_its_keys(capsys):
    flags = "bench --arch resnet8 --batch 2 --T 1 --generator-width 4 --z-dim 4".split()
    assert told(capsys, *flags).keys() == {
        "distill_step_s", "synthesis_step_s", "teacher_forward_s", "student_forward_s",
        "images_per_s", "gflops", "peak_mib"}

def test_bench_counts_operations_and_bytes():
    a = types.SimpleNamespace(arch="resnet8", student_arch="", T=2, batch=4, threads=1,
                              device="cpu", tf32=False)
    row, first = bench_limits(a), 32 * 32 * 16  # numbers of the first layer
    teacher = 3 * first + 2 * first / 2 + 2 * first / 4
    student = 2 * teacher - first  # the first convolution runs once
    weights = stars.init_weights(stars.weight_shapes("resnet8", 10), np.random.default_rng(0))
    net = stars.Net(weights)
    before = stars.macs(net, 32)
    spiking = stars.macs(net._replace(T=2, activation=stars.Neuron()), 32)
    numbers = {k: row[k][1] * row["bytes"] / (4 * a.batch) for k in BENCHED[:4]}
    macs = {k: row[k][0] * row["flops"] / (2 * a.batch) for k in BENCHED[:4]}
    assert numbers["teacher_forward_s"] == pytest.approx(2 * teacher)
    assert numbers["student_forward_s"] == pytest.approx(3 * student + 2 * 2 * teacher)
    assert numbers["distill_step_s"] == pytest.approx(2 * teacher + 7 * student + 6 * 2 * teacher)
    generator = 64 * 64 + 16 * 16 * 64 + 32 * 32 * 32 + 32 * 32 * 3
    assert numbers["synthesis_step_s"] == pytest.approx(
        2 * (teacher + student) + 4 * (teacher + 2 * teacher) + 13 * generator)
    generator = 64 * 64 * 256 + 9 * (64 * 64 * 16 * 16 + 32 * 64 * 32 * 32 + 3 * 32 * 32 * 32)
    assert macs["teacher_forward_s"] == pytest.approx(before)
    assert macs["distill_step_s"] == pytest.approx(before + 3 * spiking)
    assert macs["synthesis_step_s"] == pytest.approx(2 * before + 2 * spiking + 3 * generator)

def test_what_is_shipped_is_what_its_sums_say():
    folder = Path(stars.__file__).parent / "data"
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    for path in folder.glob("*.npz"):
        assert sums[path.name] == digest(path)
        _, info = stars.load_weights(path)
        assert info["command"].startswith("python stars.py")
        assert "teacher" not in path.name or 0 < info["accuracy"] < 1

# ---- PyTorch peer --------------------------------------------------------------------------------
# The networks, Eq. (1)-(10), (12) and both steps again, from the equations, with autograd. Images
# are NCHW in [0, 1]; a net is a stars.Net of tensors; dtype and memory format follow the weights.

try:
    import torch
    import torch.nn.functional as F
    torch.set_num_threads(1)  # for the small tensors of the tests; the bench sets its own
except ImportError:
    torch = F = None

PEER_DEVICE = "cpu"

def peer_tensor(array, channels_last=False):
    fmt = torch.channels_last if channels_last and array.ndim == 4 else torch.contiguous_format
    return torch.tensor(np.array(array), device=PEER_DEVICE).contiguous(memory_format=fmt)

def peer_images(x, channels_last=False):
    return peer_tensor(np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2))), channels_last)

def peer_params(params, channels_last=False):
    """Arrays by name -> tensors; thresholds and amplitudes become floats."""
    return {k: peer_tensor(v, channels_last) if np.ndim(v) else float(v) for k, v in params.items()}

def peer_leaves(params):
    """Fresh leaves over the same storage -> (params, the weights alone)."""
    p = {k: v.detach() if torch.is_tensor(v) else v for k, v in params.items()}
    return p, {k: v.requires_grad_() for k, v in p.items()
               if torch.is_tensor(v) and "running_" not in k}

class PeerSpike(torch.autograd.Function if torch else object):
    """s = 1[u >= V]; its derivative is Eq. (2)."""

    @staticmethod
    def forward(ctx, u, v_th, kind):
        ctx.save_for_backward(u)
        ctx.v_th, ctx.kind = v_th, kind
        return (u >= v_th).to(u.dtype)

    @staticmethod
    def backward(ctx, ds):
        x = (ctx.saved_tensors[0] - ctx.v_th).div_(ctx.v_th)
        if ctx.kind == "sigmoid":  # a s (1 - s), s = sigmoid(a x)
            ds = torch.ops.aten.sigmoid_backward(ds, x.mul_(4).sigmoid_()).mul_(4 / ctx.v_th)
        elif ctx.kind == "atan":
            ds = ds / (1 + (math.pi * x) ** 2) / ctx.v_th
        else:
            ds = ds * (1 - x.abs()).clamp_(min=0) / ctx.v_th
        return ds, None, None

def peer_lif(current, T, first, v_th, amplitude, neuron):  # Eq. (1)
    """Currents (T*N, ...), (N, ...) if first: the same at every step -> A * spikes (T*N, ...)."""
    u, s, spikes = neuron.v_init * v_th, None, []
    for current in [current] * T if first else current.chunk(T):
        if s is not None:
            s = s.detach() if neuron.detach_reset else s
            u = u - v_th * s if neuron.reset == "soft" else torch.addcmul(u, u, s, value=-1)
        u = (current + neuron.lam * u if s is None else
             torch.add(current, u, alpha=neuron.lam))
        s = PeerSpike.apply(u, v_th, neuron.surrogate)
        spikes.append(s)
    z = torch.cat(spikes)
    return z if amplitude == 1 else amplitude * z

@functools.lru_cache
def spikingjelly_node(lam, v_th):
    np.int = int  # which NumPy had when its kernels were written
    from spikingjelly.activation_based import neuron, surrogate
    return neuron.LIFNode(1 / (1 - lam), False, v_th, 0.0, surrogate.Sigmoid(4.0 / v_th),
                          detach_reset=True, step_mode="m", backend="cupy")

def spikingjelly_lif(current, T, first, v_th, amplitude, neuron):
    """peer_lif for a hard reset that is detached, by SpikingJelly's fused kernels."""
    node = spikingjelly_node(neuron.lam, v_th)
    node.reset()
    current = current.permute(0, 2, 3, 1)  # of channels_last: contiguous
    current = (current.expand(T, *current.shape).contiguous() if first else
               current.unflatten(0, (T, -1)))
    z = node(current).flatten(0, 1).permute(0, 3, 1, 2)
    return z if amplitude == 1 else amplitude * z

def peer_batch_norm(p, name, a, train, running):
    """Writes the new running statistics, if train, into the dict `running`."""
    stats = [p.get(name + ".running_mean"), p.get(name + ".running_var")]
    if train and stats[0] is not None:
        stats = [v.clone() for v in stats]  # F.batch_norm updates in place
        running[name + ".running_mean"], running[name + ".running_var"] = stats
    return F.batch_norm(a, *stats, p[name + ".weight"], p[name + ".bias"], train, .1, 1e-5)

def peer_forward(net, x, train=False, taps=None, fired=None):
    """x normalised (N, 3, H, W) -> logits (N, K), features (N, D), running statistics (if train).

    taps: a list that collects (BN input, gamma, running mean, running var) of every BN layer;
    fired: a dict that collects the outputs of the activations.
    """
    p, running = net.params, {}

    def conv_bn(conv, name, a, stride=1):
        w = p[conv + ".weight"]
        a = F.conv2d(a, w, None, stride, w.shape[-1] // 2)
        if taps is not None:
            taps.append([a] + [p[f"{name}.{k}"] for k in ("weight", "running_mean", "running_var")])
        return peer_batch_norm(p, name, a, train, running)

    def fire(name, a):
        if isinstance(net.activation, stars.Neuron):
            z = peer_lif(a, net.T, len(a) == len(x), p.get(name + ".v_th", 1.),
                         p.get(name + ".amplitude", 1.), net.activation)
        else:
            z = F.relu(a)
        if fired is not None:
            fired[name] = z
        return z

    def shortcut(name, z, channels, stride):
        if name + ".0.weight" in p:
            return conv_bn(name + ".0", name + ".1", z, stride)
        extra = channels - z.shape[1]  # option A
        z = z[:, :, ::stride, ::stride]
        return F.pad(z, (0, 0, 0, 0, extra // 2, extra - extra // 2)) if extra else z

    if "conv1.weight" in p:
        z = fire("bn1", conv_bn("conv1", "bn1", x))
        found = [re.match(r"layer(\d+)\.(\d+)\.conv1\.weight", k) for k in p]
        for i, j in sorted((int(m[1]), int(m[2])) for m in found if m):
            block, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            a = conv_bn(block + ".conv1", block + ".bn1", z, stride)
            a = conv_bn(block + ".conv2", block + ".bn2", fire(block + ".bn1", a))
            z = fire(block + ".bn2", a + shortcut(block + ".shortcut", z, a.shape[1], stride))
    else:
        found = [re.match(r"features\.(\d+)\.weight", k) for k in p]
        at = sorted(int(m[1]) for m in found if m and p[m[0]].ndim == 4)
        z = x
        for i, following in zip(at, at[1:] + [at[-1] + 4]):  # conv, BN, relu, (pool)
            z = fire(f"features.{i + 1}", conv_bn(f"features.{i}", f"features.{i + 1}", z))
            z = F.max_pool2d(z, 2) if following == i + 4 else z
    head = "linear" if "linear.weight" in p else "classifier"
    features = z.mean((2, 3)).unflatten(0, (net.T, -1)).mean(0)
    return F.linear(features, p[head + ".weight"], p[head + ".bias"]), features, running

def peer_generator(p, z):
    """Latents (N, Z [+ classes, one-hot, behind]) -> images (N, 3, H, W)."""
    width = len(p["bn0.weight"])
    bn = lambda i, a: peer_batch_norm(p, f"bn{i}", a, True, {})
    conv = lambda i, a: F.conv2d(a, p[f"conv{i}.weight"], p.get(f"conv{i}.bias"), padding=1)
    last = p["conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    a = F.linear(z, p["fc.weight"], p["fc.bias"])
    side = math.isqrt(a.shape[1] // width)
    a = bn(0, a.view(-1, width, side, side).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format))
    for i in (1, 2):
        a = F.leaky_relu(bn(i, conv(i, F.interpolate(a, scale_factor=2))), .2)
    return torch.sigmoid(conv(3, a))

def peer_augment(x, offsets, flips):
    """Zero-pad by 4, crop at offsets (N, 2) = (row, column) in 0..8, then mirror at flips (N,)."""
    n, c, h, w = x.shape
    offsets, flips = torch.as_tensor(offsets), torch.as_tensor(flips)
    row, column = (torch.arange(size, device=x.device).expand(n, -1) for size in (h, w))
    column = torch.where(flips.bool()[:, None], w - 1 - column, column) + offsets[:, 1:]
    at = ((row + offsets[:, :1])[:, :, None] * (w + 8) + column[:, None]).view(n, 1, -1)
    y = F.pad(x, (4,) * 4).reshape(n, c, -1).gather(2, at.expand(-1, c, -1)).view(n, c, h, w)
    last = x.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.channels_last) if last else y

@functools.lru_cache
def peer_constants(values, dtype, device):
    return torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)

def peer_normalise(x, net):
    mean, std = (peer_constants(tuple(v), x.dtype, x.device) for v in (net.mean, net.std))
    return (x - mean) / std

def peer_bn_matching(taps):  # Eq. (3)
    total = 0.
    for a, _, mean, var in taps:
        batch_var, batch_mean = torch.var_mean(a, (0, 2, 3), correction=0)
        total = total + (batch_mean - mean).norm() + (batch_var - var).norm()
    return total

def peer_class_prior(t, y=None):  # Eq. (4)
    return F.cross_entropy(t, t.argmax(1) if y is None else y)

def peer_balance(t):  # Eq. (5)
    p = t.softmax(1).mean(0)
    return torch.xlogy(p, p).sum()

def peer_kl(t, s):
    """KL(softmax t || softmax s) of each sample."""
    return F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)

def peer_adversarial(t, s):  # Eq. (6)
    return -(peer_kl(t, s) * (t.argmax(1) == s.argmax(1))).mean()

def peer_cosines(f):
    square = f.square().sum(1, keepdim=True)
    unit = f * (square > 0) / torch.where(square > 0, square, 1.).sqrt()
    return unit @ unit.T

def peer_rca(f_t, f_s):  # Eq. (7)
    n = len(f_t)
    off_diagonal = 1 - torch.eye(n, dtype=f_t.dtype, device=f_t.device)
    return ((peer_cosines(f_t) - peer_cosines(f_s)).square() * off_diagonal).sum() / (n * (n - 1))

def peer_tar(taps, pi, kappa, tau):  # Eq. (8)
    """pi: (L, K).  The mean runs over all (l, c, k): a wide layer counts for more."""
    terms, pi = [], torch.tensor(pi).to(taps[0][0])
    for (a, gamma, mean, var), target in zip(taps, pi, strict=True):
        scale = gamma.sign() / ((var + 1e-5).sqrt() * tau)
        h = torch.addcmul((-mean * scale)[:, None, None], a, scale[:, None, None])  # h / tau
        e = torch.stack([torch.sigmoid(h - k / tau).mean((0, 2, 3)) for k in kappa], 1)
        terms.append((e - target).square() / (target * (1 - target)))  # (C, K)
    return torch.cat(terms).mean()

def peer_synthesis_loss(x, teacher, student, weights, y=None, tail=None, pi=None):  # Eq. (9)
    """x (N, 3, H, W) in [0, 1] -> {'total': weighted sum, and each term, unweighted}.

    y (N,): the classes of Eq. (4); pi (L, K): the targets of Eq. (8), layers in order of use.
    """
    taps, x = [], peer_normalise(x, teacher)
    t, f_t, _ = peer_forward(teacher, x, taps=taps)
    if weights.adv or weights.rca:
        s, f_s, _ = peer_forward(student, x)
    term = {"bn": lambda: peer_bn_matching(taps), "oh": lambda: peer_class_prior(t, y),
            "bal": lambda: peer_balance(t), "adv": lambda: peer_adversarial(t, s),
            "rca": lambda: peer_rca(f_t, f_s),
            "tar": lambda: peer_tar(taps, pi, tail.kappa, tail.tau)}
    parts = {k: term[k]() for k in term if getattr(weights, k)}
    return {**parts, "total": sum(getattr(weights, k) * v for k, v in parts.items())}

def peer_synthesis_step(generator, z, teacher, student, weights, crop, y=None, tail=None, pi=None):
    """-> parts, gradients of the generator, dL/d(images before augmentation), images.

    y (N,): Eq. (4) asks for these classes.
    """
    p, w = peer_leaves(generator)
    images = peer_generator(p, z)
    parts = peer_synthesis_loss(peer_augment(images, *crop), teacher, student, weights, y, tail, pi)
    *grads, dx = torch.autograd.grad(parts["total"], [*w.values(), images])
    parts = {k: v.detach() for k, v in parts.items()}
    return parts, dict(zip(w, grads)), dx, images.detach()

def peer_rate_matching(z, y, T, v_th, amplitude):  # Eq. (12)
    return (z.unflatten(0, (T, -1)).mean(0) / amplitude - (y / v_th).clamp(0, 1)).square().mean()

def peer_rate_mapping(z, y, T, v_th, amplitude):  # Eq. (12) with the best P and b, by autograd
    rate = z.unflatten(0, (T, -1)).mean(0) / amplitude
    goal = (y / v_th).clamp(0, 1).permute(0, 2, 3, 1).flatten(0, 2)
    rows = torch.nn.functional.pad(rate.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.)
    ridge = torch.eye(rows.shape[1], dtype=rows.dtype) * 1e-3
    ridge[-1] = 0
    best = torch.linalg.solve(rows.T @ rows / len(rows) + ridge, rows.T @ goal / len(rows))
    return (rows @ best - goal).square().mean() + (ridge @ best * best).sum() / goal.shape[1]

def peer_distillation_step(images, teacher, student, tau, crop, w_rca=0., w_rate=0., thresholds={}):
    """images (N, 3, H, W) in [0, 1] -> loss, gradients of the student, its running statistics."""
    p, w = peer_leaves(student.params)
    outputs, fired = ({}, {}) if w_rate else (None, None)
    with torch.no_grad():
        x = peer_normalise(peer_augment(images, *crop), teacher)
        t, f_t, _ = peer_forward(teacher, x, fired=outputs)
    s, f_s, running = peer_forward(student._replace(params=p), x, train=True, fired=fired)
    loss = tau ** 2 * peer_kl(t / tau, s / tau).mean() + w_rca * peer_rca(f_t, f_s)  # Eq. (10)
    rates = [peer_rate_matching(fired[layer], outputs[layer], student.T, V,
                                p.get(layer + ".amplitude", 1.))
             for layer, V in thresholds.items() if w_rate and layer in fired
             and fired[layer].shape[1:] == outputs[layer].shape[1:]]
    if w_rate and not rates:  # no layer in common: the last of each resolution that both have
        ours, theirs = ({z.shape[2]: k for k, z in net.items()} for net in (fired, outputs))
        rates = [peer_rate_mapping(fired[ours[n]], outputs[theirs[n]], student.T,
                                   thresholds[theirs[n]], p.get(ours[n] + ".amplitude", 1.))
                 for n in ours if n in theirs]
    loss = loss + w_rate * sum(rates) / max(1, len(rates))
    return loss.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values())))), running

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed: make peer")
STUDENTS = [stars.Neuron(lam, reset, v_init, surrogate, detach)
            for (lam, v_init), (reset, surrogate, detach) in zip(
                itertools.cycle(((0.5, 0.0), (0.8, 0.5), (1.0, 0.3))),
                itertools.product(("hard", "soft"), SLOPES, (True, False)))]

def peer_pair(family, neuron, T=3):
    """A teacher, a student with a V and an A for each layer, and both as the peer takes them."""
    teacher, student = net_of(stars, family, stars.relu), net_of(stars, family, neuron, T, seed=1)
    params = dict(student.params)
    for i, layer in enumerate(stars.batch_norms(params)):
        params[layer + ".v_th"], params[layer + ".amplitude"] = 0.6 + i % 4 / 5, 0.8 + i % 3 / 5
    student, x = student._replace(params=params), images_of(family, 6) - 0.5
    head = "classifier.bias" if "classifier.bias" in params else "linear.bias"
    t, s = (stars.forward(net, x, need="")[0].logits for net in (teacher, student))
    params[head] = params[head] + (t - s).mean(0)  # so that they agree on some images: Eq. (6)
    peers = [net._replace(params=peer_params(net.params)) for net in (teacher, student)]
    return teacher, student, *peers

def assert_agree(ours, theirs, tol=1e-9):
    """Numbers, arrays and tensors, or dicts of them, images NHWC and NCHW; not all of them 0."""
    if not isinstance(ours, dict):
        ours, theirs = {"": ours}, {"": theirs}
    assert ours.keys() == theirs.keys()
    theirs = {k: np.asarray(v.detach() if torch.is_tensor(v) else v) for k, v in theirs.items()}
    assert np.mean([np.any(v) for v in theirs.values()]) > 0.7  # layers of two channels may be dead
    for name, other in theirs.items():
        if np.ndim(other) == 4 and np.shape(ours[name]) != other.shape:
            other = other.transpose(0, 2, 3, 1)
        assert_close(ours[name], other, tol)

@needs_torch
@pytest.mark.parametrize("classes", (0, 3))
@pytest.mark.parametrize("family", FAMILIES)
def test_peer_synthesis_steps_agree(family, classes):
    """The gradient of every weight of the generator, through the augmentation."""
    teacher, student, *peers = peer_pair(family, STUDENTS[4])
    params, z, labels = generator_case(stars, FAMILIES[family][1], classes, n=6)
    crop = stars.draw_augmentation(np.random.default_rng(3), 6)
    images, images_back = stars.generator(params, z)
    x, augment_back = stars.augment(images, *crop)
    parts, dx = stars.synthesis_loss(x, teacher, student, labels=labels)
    dimages = augment_back(dx)
    assert parts["adv"] < 0
    theirs = peer_synthesis_step(
        peer_params(params), peer_tensor(z), *peers, stars.Weights(), crop,
        None if labels is None else torch.tensor(labels), stars.Tail(),
        stars.Tail().targets(len(stars.batch_norms(teacher.params)), 3))
    for ours, other in zip((parts, images_back(dimages)[1], dimages, images), theirs, strict=True):
        assert_agree(ours, other)

@needs_torch
@pytest.mark.parametrize("family,of", [*zip(FAMILIES, FAMILIES), ("projection", "vgg11")])
def test_peer_distillation_steps_agree(family, of):
    """Eq. (10), the gradient of every weight of the student, its running statistics."""
    x, crop = images_of(of, 4), stars.draw_augmentation(np.random.default_rng(3), 4)
    for neuron in STUDENTS if family == "option A" else STUDENTS[::5]:
        teacher, student, *peers = peer_pair(family, neuron)
        if of != family:
            teacher, _, peers[0], _ = peer_pair(of, neuron)
        V = {layer: 0.5 + 0.1 * (i % 7) for i, layer in enumerate(stars.batch_norms(teacher.params))
             if "shortcut" not in layer}
        cropped = stars.augment(x, *crop)[0]
        new = {k: np.array(v) for k, v in student.params.items()}
        loss = stars.distillation_step(student._replace(params=new), {}, cropped, teacher, 2.5,
                                       1., 0., 3., 20., V)["total"]
        grads = {k: (student.params[k] - new[k]) / 1.9 for k in trainable(student.params)
                 if np.ndim(new[k])}
        running = {k: new[k] for k in new if "running" in k}
        theirs = peer_distillation_step(peer_images(x), *peers, 2.5, crop, 3., 20., V)
        for ours, other in zip((loss, grads, running), theirs, strict=True):
            assert_agree(ours, other)

@needs_torch
def test_the_readme_trains_a_pytorch_generator(monkeypatch):
    readme = Path(stars.__file__).with_name("README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    example = next(block for block in blocks if "torch.randn" in block)
    last = torch.nn.Linear(256, 3072)
    space = {"generator": torch.nn.Sequential(last, torch.nn.Sigmoid(),
                                              torch.nn.Unflatten(1, (3, 32, 32)))}
    monkeypatch.chdir(Path(stars.__file__).parent)
    exec(example, space)
    y, dy = space["images"].detach().flatten(1), torch.from_numpy(space["dx"].transpose(0, 3, 1, 2))
    wanted = (dy.flatten(1) * y * (1 - y)).sum(0)
    assert wanted.abs().max() > 0 and torch.allclose(last.bias.grad, wanted, rtol=1e-4, atol=1e-7)

@needs_torch
def test_the_readme_converts_a_pytorch_checkpoint_and_compares_it(tmp_path, monkeypatch, capsys):
    readme = Path(stars.__file__).with_name("README.md").read_text()
    command = next(line for line in readme.splitlines() if "torch.load('model.th'" in line)
    compare = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "predict" in b)
    nn, layers, c = torch.nn, [], 3
    for n, k in zip((1, 1, 2, 2, 2), (4, 8, 16, 32, 32)):
        for _ in range(n):
            layers += [nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k, momentum=None), nn.ReLU()]
            c = k
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(collections.OrderedDict(
        features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
        fc=nn.Linear(c, 10)))
    model(3 * torch.randn(64, 3, 32, 32))  # statistics that are not 0 and 1
    monkeypatch.chdir(tmp_path)
    state = {"module." + name: value for name, value in model.state_dict().items()}
    torch.save({"net": state, "acc": 91.2, "epoch": 7}, "model.th")
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    differences = []
    for layer in layers[3], nn.AvgPool2d(2):  # the second is not what stars.py takes for granted
        model.features[3] = layer
        exec(compare.replace("resnet20", "vgg11"), {"model": model.eval()})
        differences.append(float(capsys.readouterr().out))
    assert differences[0] < 1e-5 < 1e-2 < differences[1]

# `python test_stars.py bench` runs `stars.py bench` and the peer's, each in a process of its own.

BENCHED = ("distill_step_s", "synthesis_step_s", "teacher_forward_s", "student_forward_s",
           "peak_mib")

def peer_bench(a):
    """What stars.bench measures, of the peer in the memory format a.format."""
    global peer_lif, PEER_DEVICE
    before, on_gpu = stars.linux_says("VmRSS:"), a.device == "gpu"
    rng, last = np.random.default_rng(0), a.format != "contiguous"
    if a.format == "spikingjelly":
        peer_lif = spikingjelly_lif
    if on_gpu:
        PEER_DEVICE = "cuda"
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = a.tf32
    torch.set_num_threads(a.threads)
    load = lambda shapes: peer_params(stars.init_weights(shapes, rng), last)
    teacher = stars.Net(load(stars.weight_shapes(a.arch, 10)))
    shapes = stars.weight_shapes(a.student_arch or a.arch, 10)
    student = stars.Net(load(shapes), stars.Neuron(), a.T)
    generator = load(stars.generator_shapes(32, 64, 256))
    pool = peer_images(rng.random((a.batch, 32, 32, 3), np.float32), last)
    z = torch.randn(a.batch, 256, device=PEER_DEVICE)
    crop = [peer_tensor(v) for v in stars.draw_augmentation(rng, a.batch)]
    normal, layers = peer_normalise(pool, teacher), len(stars.batch_norms(teacher.params))
    pi = peer_tensor(stars.Tail().targets(layers, 10))
    V = dict.fromkeys(stars.batch_norms(teacher.params), 1.)
    sgd = torch.optim.SGD(peer_leaves(student.params)[1].values(), .05, .9, 0, 5e-4, True)
    adam = torch.optim.Adam(peer_leaves(generator)[1].values(), 1e-3, (.5, .999))

    def update(optimiser, grads):  # its leaves share the storage of the weights
        for weight, grad in zip(optimiser.param_groups[0]["params"], grads.values()):
            weight.grad = grad
        optimiser.step()

    def distill():
        _, grads, running = peer_distillation_step(pool, teacher, student, 4., crop,
                                                   stars.Weights().rca, stars.Config.w_rate, V)
        update(sgd, grads)
        student.params.update(running)

    def synthesise():
        update(adam, peer_synthesis_step(generator, z, teacher, student, stars.Weights(), crop,
                                         None, stars.Tail(), pi)[1])

    def seconds(job, mode=contextlib.nullcontext):
        def once():
            with mode():
                job()
            if on_gpu:
                torch.cuda.synchronize()
        return float(np.median(timeit.repeat(once, number=1, repeat=9)[2:]))

    values = (seconds(distill), seconds(synthesise),
              seconds(lambda: peer_forward(teacher, normal), torch.no_grad),
              seconds(lambda: peer_forward(student, normal, True), torch.no_grad),
              torch.cuda.max_memory_reserved() / 2 ** 20 if on_gpu else
              (stars.linux_says("VmHWM:") - before) / 1024)
    return dict(zip(BENCHED, values))

def bench_limits(a):
    """What the machine does a second, and the least seconds of each step at that: (operations,
    bytes). flops: of large matrix products; bytes: read and written by copies, both on all threads.
    Operations of a step: its multiply-adds, as direct convolutions, times two, and as many again
    for each gradient asked for. Bytes: convolution and batch norm with activation are a kernel
    each, and no map fits the cache. A layer whose convolution gives A numbers and whose activation
    Z then costs 7 A + 6 Z of them in train mode, forward alone 3 A + 2 Z; in eval mode 2 A + 4 Z
    with a way back to the images, and 2 Z, all in one kernel, without."""
    stars.use_device(a.device, a.tf32)
    xp, on_gpu = stars.xp, a.device == "gpu"
    parts = 1 if on_gpu else a.threads
    m = xp.ones((8192 if on_gpu else 1024,) * 2, np.float32)
    x, y = xp.ones((2, parts, 2 ** 28 if on_gpu else 2 ** 24), np.float32)

    def fastest(job):
        once = lambda: (stars.parallel(job, parts, 1), stars.to_host(x[0, :1]))
        return min(timeit.repeat(once, number=1, repeat=9))

    flops = 2 * len(m) ** 3 * parts / fastest(lambda i, j: m @ m)
    copied = 2 * x.nbytes / fastest(lambda i, j: xp.copyto(y[i], x[i]))
    counts, rng = [], np.random.default_rng(0)
    for arch, how in (a.arch, ()), (a.student_arch or a.arch, (stars.Neuron(), a.T)):
        weights = stars.init_weights(stars.weight_shapes(arch, 10), rng)
        net, A, Z = stars.Net(stars.on_device(weights), *how), [], []
        stars.forward(net, xp.zeros((1, 32, 32, 3), np.float32), need="",
                      tap=lambda _, a: A.append(a.size), watch=lambda _, z: Z.append(z.size))
        counts += [stars.macs(net, 32), sum(A), sum(Z)]
    shapes = stars.generator_shapes(32, 64, 256)
    convs = [(side ** 2, shapes[f"conv{i}.weight"]) for i, side in ((1, 16), (2, 32), (3, 32))]
    g = math.prod(shapes["fc.weight"]) + sum(area * math.prod(w) for area, w in convs)
    gA = shapes["fc.weight"][0] + sum(area * w[0] for area, w in convs)
    t, tA, tZ, s, sA, sZ = counts
    steps = ((t + 3 * s, 2 * tZ + 7 * sA + 6 * sZ),
             (2 * t + 2 * s + 3 * g, 2 * (tA + sA) + 4 * (tZ + sZ) + 13 * gA),
             (t, 2 * tZ), (s, 3 * sA + 2 * sZ))
    least = [(2 * a.batch * macs / flops, 4 * a.batch * n / copied) for macs, n in steps]
    return dict(flops=flops, bytes=copied) | dict(zip(BENCHED, least))

def machine():
    model = None
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    variables = ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items())
                          if k.startswith(("OPENBLAS_", "OMP_", "MKL_")))
    return (f"machine: {model[1] if model else platform.processor()}, {stars.cores()} cores of "
            f"{os.cpu_count()} to use, load {os.getloadavg()[0]:.1f}\nnumpy {np.__version__}: "
            f"{blas['name']} {blas['version']}, {blas.get('openblas configuration', '')}\n"
            f"set: {variables or 'no OPENBLAS_, OMP_ or MKL_ variable'}\n"
            f"torch {torch.__version__ if torch else 'is not installed'}"
            f"{torch and torch.cuda.is_available() and ', ' + torch.cuda.get_device_name() or ''}")

def last_row(command):
    """What a process prints last, as JSON; ends with its code, if it fails."""
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:  # it has said why
        raise SystemExit(run.returncode)
    return json.loads(run.stdout.splitlines()[-1])

def bench(argv):
    """Rounds of stars.py and of the peer's variants (--peers A,B), in turn, and their ratios."""
    cli = argparse.ArgumentParser(prog="test_stars.py bench", allow_abbrev=False)
    for name, value in dict(arch="resnet20", student_arch="", T=4, batch=128, threads=0, rounds=3,
                            device="cpu", peers="", format="", python=sys.executable).items():
        cli.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    cli.add_argument("--tf32", action="store_true")
    a = cli.parse_args(argv)
    a.threads = a.threads or stars.cores()
    if a.format:  # in a process of its own
        return print(json.dumps((bench_limits if a.format == "limits" else peer_bench)(a)))
    flags = [text for name in ("arch", "student_arch", "T", "batch", "threads", "device")
             if getattr(a, name) for text in ("--" + name.replace("_", "-"), str(getattr(a, name)))]
    flags += ["--tf32"] * a.tf32
    print(machine())
    ours = [a.python, stars.__file__, "bench", *flags]  # perhaps another Python than the peer's
    if torch is None:
        print("PyTorch is not installed (make peer does it): stars.py alone", flush=True)
        raise SystemExit(subprocess.run(ours).returncode)
    kinds = ["contiguous", "channels_last"] + ["spikingjelly"] * (
        a.device == "gpu" and importlib.util.find_spec("spikingjelly") is not None)
    kinds = a.peers.split(",") if a.peers else kinds
    theirs = {f: [sys.executable, __file__, "bench", *flags, "--format", f] for f in kinds}
    rows = {name: [] for name in ("stars.py", *theirs)}
    for i in range(a.rounds):
        for name, command in {"stars.py": ours + ["--json", "--quiet"], **theirs}.items():
            row = last_row(command)
            rows[name].append({k: row[k] or math.nan for k in BENCHED})
            print(f"round {i + 1} {name:13}", *(f"{k} {rows[name][-1][k]:.3f}" for k in BENCHED),
                  flush=True)
    medians = {name: {k: float(np.median([row[k] for row in rows[name]])) for k in BENCHED}
               for name in rows}
    limits = last_row([*theirs[kinds[0]][:-1], "limits"])
    print("a second: {flops:.3g} operations of matrix products, {bytes:.3g} bytes of copies, read "
          "and written;\nbelow, the seconds that those of a step need at least".format(**limits))
    best = min(theirs, key=lambda f: sum(medians[f][k] for k in BENCHED[:2]))
    print(f"medians of {a.rounds} rounds, paired ratios to PyTorch {best} (its best variant)\n"
          f"{'':18} {'operations':>10} {'bytes':>9} {'stars.py':>9} {'PyTorch':>9} {'ratio':>7}  "
          "of each round")
    for k in BENCHED:
        ratios = [x[k] / y[k] for x, y in zip(rows["stars.py"], rows[best])]
        least = "{:10.4g} {:9.4g}".format(*limits[k]) if k in limits else " " * 20
        print(f"{k:18} {least} {medians['stars.py'][k]:9.4g} {medians[best][k]:9.4g} "
              f"{np.median(ratios):7.2f}  {' '.join(f'{r:.2f}' for r in ratios)}")

# ---- 12  The ablation: python test_stars.py ablation ---------------------------------------------

def ablation_run(cells, jobs):
    """Each cell {folder: flags of stars.py} in a process of its own, `jobs` at once. What is done
    stays done, what is begun is resumed. The student of each epoch goes to FOLDER/after-EPOCH.npz.
    -> folders of the cells that failed"""
    waiting, running, seen, failed = [*cells], {}, {}, []
    threads = ["--threads", str(max(1, stars.cores() // jobs))]
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                if not (folder / "summary.json").exists():
                    begun = (folder / "config.json").exists()
                    flags = ["--resume", folder] if begun else [*cells[folder], "--out", folder]
                    running[folder] = subprocess.Popen([sys.executable, stars.__file__, *map(
                        str, flags), *threads], stdout=subprocess.DEVNULL)
            time.sleep(1)
            for folder, process in [*running.items()]:
                code, path = process.poll(), folder / "checkpoint.npz"
                if path.exists() and seen.get(folder) != path.stat().st_mtime_ns:
                    seen[folder] = path.stat().st_mtime_ns
                    with np.load(path) as arrays:
                        epoch = len(json.loads(str(arrays["info"]))["rows"])
                        student = {k[8:]: arrays[k] for k in arrays.files if k[:8] == "student/"}
                    if student:
                        np.savez(folder / f"after-{epoch}.npz", **student)
                if code is not None:
                    del running[folder]
                    failed += [str(folder)] * (code != 0)
                    print(folder, f"failed with code {code}" if code else "is done", flush=True)
    finally:
        for process in running.values():
            process.terminate()
    return failed

def layer_exceedances(teacher, x, tail=stars.Tail()):
    """Mean soft exceedance of uint8 images x over each kappa, (layers, kappas), as in Eq. (8)."""
    found = []
    def tap(layer, a):
        gamma, mean, var = (teacher.params[f"{layer}.{part}"] for part in
                            ("weight", "running_mean", "running_var"))
        h = np.sign(gamma) * (a - mean) / np.sqrt(var + 1e-5)
        found.append([float((0.5 + 0.5 * np.tanh((h - k) / (2 * tail.tau))).mean())
                      for k in tail.kappa])
    images = x.astype(np.float32) / 255
    stars.forward(teacher, stars.normalise(images, teacher.mean, teacher.std)[0], tap=tap, need="x")
    return found

def cell_settings(folder):
    """The settings and the teacher of a run."""
    settings = json.loads((folder / "config.json").read_text())
    c = stars.Config(**{k: v for k, v in settings.items() if hasattr(stars.Config, k)})
    return stars.settle(c), stars.load_net(c, c.teacher or stars.shipped(c))[0]

def ablation_row(folder, curve, real):
    """All that is known of a cell that is done; curve: test images for each point of its curve."""
    (c, teacher), row = cell_settings(folder), json.loads((folder / "summary.json").read_text())
    epochs = rows_of(folder)
    student = teacher._replace(T=c.T, activation=stars.Neuron(c.lam, c.reset, c.v_init,
                                                              c.surrogate))
    row |= dict(images_seen=epochs[-1]["images_seen"], epochs=epochs, curve=[], folder=str(folder))
    size = real[0].shape[1]
    pool = np.memmap(folder / "pool.bin", np.uint8, "r").reshape(-1, size, size, 3)
    row["exceedances"] = layer_exceedances(teacher, pool[-512:])
    for epoch in epochs[c.warm_up:] if curve else ():
        path = folder / f"after-{epoch['epoch']}.npz"
        if not path.exists():  # the epoch took less than the second between two looks
            continue
        with np.load(path) as arrays:
            net = student._replace(params=stars.on_device(dict(arrays)))
        found = stars.evaluate(net, real[0][:curve], real[1][:curve])
        row["curve"].append((epoch["images_seen"], found["accuracy"]))
    return row

def ablation_table(rows):
    """Lines of the table: mean and values of each method, its paired differences to bn."""
    accuracy = {(row["method"], *row["seeds"]): 100 * row["accuracy"] for row in rows}
    yield "| method | accuracy, % | of each seed | minus bn | mean | firing rate, % | energy, uJ |"
    yield "|---|---|---|---|---|---|---|"
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        values = {row["seeds"][0]: 100 * row["accuracy"] for row in mine}
        gaps = [v - accuracy["bn", seed] for seed, v in values.items()
                if ("bn", seed) in accuracy and method != "bn"]
        error = f" ± {np.std(gaps, ddof=1) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
        yield (f"| {method} | {np.mean([*values.values()]):.2f} | "
               f"{', '.join(f'{v:.2f}' for v in values.values())} | "
               f"{', '.join(f'{gap:+.2f}' for gap in gaps)} | "
               f"{f'{np.mean(gaps):+.2f}{error}' if gaps else ''} | "
               f"{100 * np.mean([row['firing_rate'] for row in mine]):.1f} | "
               f"{np.mean([row['energy_uj'] for row in mine]):.1f} |")

def ablation_figure(rows, real, targets, path):
    """Accuracy against images seen; exceedances and their targets, layer by layer, over real's."""
    try:
        from matplotlib import figure
    except ImportError:
        return print(f"no {path}: matplotlib is not installed")
    page = figure.Figure(figsize=(15, 3.6), layout="constrained")
    axes = page.subplots(1, 4)
    axes[0].set(xlabel="images seen", ylabel="test accuracy, %")
    methods = [*dict.fromkeys(row["method"] for row in rows)]
    for row in rows:
        style = dict(color=f"C{methods.index(row['method'])}",
                     label=row["method"] if row["seeds"] == rows[0]["seeds"] else None)
        if row["curve"]:
            axes[0].plot(*zip(*((n, 100 * v) for n, v in row["curve"])), **style)
        for k, axis in enumerate(axes[1:]):
            axis.plot([e[k] / r[k] for e, r in zip(row["exceedances"], real)], **style)
    for k, axis in enumerate(axes[1:]):
        axis.axhline(1, color="black", linewidth=0.8)
        axis.plot([t[k] / r[k] for t, r in zip(targets, real)], "k:", label="target of Eq. (8)")
        axis.set(xlabel="batch norm of the teacher, from the input",
                 title=f"exceedance of {stars.Tail.kappa[k]} sd, real images = 1", ylim=(0, 1.6))
    page.legend(*axes[3].get_legend_handles_labels(), loc="outside right")
    page.savefig(path, dpi=110)

def ablation(argv):
    """The table of methods and seeds, --jobs runs at a time; all other flags go to stars.py."""
    cli = argparse.ArgumentParser(prog="test_stars.py ablation", allow_abbrev=False)
    for name, value, about in (
            ("runs", "runs/ablation", "folder of the runs"), ("seeds", "1,2", ""),
            ("methods", "bn,bn+rca,bn+tar,stars,real", "real: the ceiling, on the training set"),
            ("jobs", 1, "runs at a time"), ("curve", 2000, "test images for a point of the curve"),
            ("save", "", "path of the results, without .json and .png"),
            ("w-rca", "", "for the methods that have it"), ("w-tar", "", "likewise"),
            ("dataset", "cifar10", ""), ("data-dir", "data", "")):
        cli.add_argument("--" + name, type=type(value), default=value, help=about)
    a, flags = cli.parse_known_args(argv)
    if a.jobs < 1:
        cli.error("--jobs must be 1 or more")
    flags += ["--dataset", a.dataset, "--data-dir", a.data_dir]
    cells = {}
    for seed, method in itertools.product(a.seeds.split(","), a.methods.split(",")):
        rca, tar = stars.METHODS.get(method, (0, 0))
        cells[folder := Path(a.runs) / f"{method}-s{seed}"] = [
            *flags, "--seed", seed, "--method", method,
            *["--w-rca", a.w_rca] * bool(rca and a.w_rca),
            *["--w-tar", a.w_tar] * bool(tar and a.w_tar)]
        _, now = stars.parse(cells[folder])  # ends with code 2 where a flag is wrong
        if (folder / "config.json").exists():
            stars.same_run(folder, json.loads((folder / "config.json").read_text()),
                           {k: v for k, v in now.items() if k not in stars.HERE})
    test = stars.data_of(stars.Config(dataset=a.dataset, data_dir=a.data_dir,
                                      download="--download" in flags), "test")
    failed = ablation_run(cells, a.jobs)
    rows = [ablation_row(folder, a.curve, test) for folder in cells if str(folder) not in failed]
    print(*ablation_table(rows), sep="\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if a.save:
        teacher = cell_settings(Path(rows[0]["folder"]))[1]
        real = layer_exceedances(teacher, test[0][:512])
        classes = stars.predict(teacher, test[0][:1])[0].shape[1]
        targets = stars.Tail().targets(len(real), classes).tolist()
        command = f"python test_stars.py ablation {shlex.join(argv)}"
        Path(a.save + ".json").write_text(stars.to_json(dict(
            command=command, rows=rows, exceedances_of_real_images=real,
            targets_of_equation_8=targets)) + "\n")
        ablation_figure(rows, real, targets, a.save + ".png")

def test_the_ablation_runs_each_cell_once(folder, capfd):
    put_npz("mine.npz")
    argv = ["--dataset", "mine.npz", "--runs", "cells", "--methods", "bn,real", "--jobs", "2",
            "--curve", "7", "--save", "result", "--teacher", "teacher.npz", *GIVEN, *TINY]
    ablation(argv)
    done = sorted(Path("cells").glob("*/student.npz"))
    assert [path.parent.name for path in done] == ["bn-s1", "bn-s2", "real-s1", "real-s2"]
    result = json.loads(Path("result.json").read_text())
    assert [row["curve"][-1][0] for row in result["rows"]] == 4 * [2 * 8]  # images seen
    layers = len(stars.batch_norms(stars.load_weights("teacher.npz")[0]))
    assert np.shape([row["exceedances"] for row in result["rows"]]) == (4, layers, 3)
    assert result["targets_of_equation_8"] == stars.Tail().targets(layers, 10).tolist()
    accuracy = [100 * row["accuracy"] for row in result["rows"]]  # of bn, real, bn, real
    table = capfd.readouterr().out
    assert f"| {accuracy[1] - accuracy[0]:+.2f}, {accuracy[3] - accuracy[2]:+.2f} |" in table
    for path in done:
        path.unlink()
    (done[3].parent / "summary.json").unlink()
    ablation(argv)  # makes the student of the last cell again from its checkpoint
    assert [path.exists() for path in done] == [False, False, False, True]
    assert capfd.readouterr().out.endswith(table[table.index("| method"):])
    with pytest.raises(stars.UserError, match="epochs was 2, not 4"):
        ablation([*argv, "--epochs", "4"])
    done[0].parent.rename("cells/aside")
    with pytest.raises(SystemExit, match="failed: cells/bn-s1"):
        ablation([*argv[:-len(TINY)], *TINY[2:], "--teacher", "none.npz", "--methods", "bn",
                  "--seeds", "1"])

def test_the_tables_of_the_readme_are_those_of_the_results():
    root, found = Path(stars.__file__).parent, []
    readme, details = (root.joinpath(name).read_text()
                       for name in ("README.md", "data/results/README.md"))
    summary = re.search(r"\| pair \|.*?\n\n", readme, re.S)[0]
    for path in sorted(root.glob("data/results/*.json")):
        for line in [*ablation_table(json.loads(path.read_text())["rows"])][2:]:
            assert line in readme + details, path.name
            method, gap = (line.split(" | ")[k].strip("| ") for k in (0, 4))
            if gap and method != "real" and path.stem.endswith("-ablation"):
                found.append(gap)
                assert gap in summary, path.name
    assert len(found) > 9

if __name__ == "__main__":
    if sys.argv[1:2] not in (["bench"], ["ablation"]):
        raise SystemExit("python test_stars.py bench, python test_stars.py ablation, or make test")
    try:
        dict(bench=bench, ablation=ablation)[sys.argv[1]](sys.argv[2:])
    except stars.UserError as error:
        raise SystemExit(f"test_stars.py: {error}") from None
