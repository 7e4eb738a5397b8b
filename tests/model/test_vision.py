import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.model import layers, vision
from tests import oracle
from tests.compile_counter import count_compiles
from tests.tiny import tiny_config

CONFIG = tiny_config()
VISION = CONFIG.thinker.vision
# (t, h, w) in patches of 14 pixels: 28×28, whole windows, partial ones on either side or both, a clip, 28×5600 and
# 5600×28.
GRIDS = ((1, 2, 2), (1, 16, 16), (1, 8, 10), (1, 10, 16), (3, 6, 14), (1, 2, 400), (1, 400, 2), (2, 16, 8))


@pytest.fixture(scope="module")
def reference():
    return oracle.thinker(CONFIG).visual


@pytest.fixture(scope="module")
def params(reference):
    return oracle.params(reference, ["blocks"])


def _media(grids, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(t * h * w, VISION.patch_dim)).astype(np.float32), (t, h, w)) for t, h, w in grids]


@torch.no_grad()
def _oracle(tower, media):
    patches = torch.tensor(np.concatenate([p for p, _ in media]))
    return tower(patches, torch.tensor([g for _, g in media])).float().numpy()


def _features(params, media, dtype=np.float32):
    return vision.vision_features(vision.vision_program(VISION), params, VISION, media, dtype)


def _loop(params):
    return params | {"blocks": layers.unstack(params["blocks"])}


def test_tower_equals_the_reference_on_every_kind_of_grid(reference, params):
    media = _media(GRIDS)
    ours, theirs = _features(params, media), _oracle(reference, media)
    ends = np.cumsum([t * h * w // 4 for t, h, w in GRIDS])
    for grid, a, b in zip(GRIDS, np.split(ours, ends[:-1]), np.split(theirs, ends[:-1])):
        assert oracle.relative_error(a, b) < 1e-5, grid


def test_looped_layers_equal_scanned_ones(reference, params):
    media = _media([(3, 6, 14), (1, 8, 10)])
    ours = _features(_loop(params), media)
    assert oracle.relative_error(ours, _oracle(reference, media)) < 1e-5
    assert oracle.relative_error(ours, _features(params, media)) < 1e-6


def test_each_block_equals_the_reference(reference, params):
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
        for block in reference.blocks
    ]
    # Whole windows: the reference's window order is then our layout.
    (_, grid) = media = _media([(2, 16, 16)])[0]
    _oracle(reference, [media])
    for hook in hooks:
        hook.remove()
    layout = vision.frame_layout(grid[1], grid[2], VISION.window_patches, VISION.spatial_merge_size)
    positions = np.stack([layout.positions] * 2)
    cos, sin = jax.jit(vision.rope_tables, static_argnums=1)(positions, VISION.hidden_size // VISION.num_heads)
    valid = np.stack([layout.valid] * 2)
    block = jax.jit(lambda p, x, kind: vision.VisionBlock(VISION).apply({"params": p}, x, cos, sin, valid, kind))
    assert len(seen) == VISION.depth
    for i, (p, (x, y)) in enumerate(zip(layers.unstack(params["blocks"]), seen)):
        ours = block(p, x.numpy().reshape(2, 256, -1), vision.LayerKind(i in VISION.fullatt_block_indexes))
        assert oracle.relative_error(ours.reshape(y.shape), y.numpy()) < 1e-5


def test_pictures_together_equal_pictures_alone(params):
    media = _media([(1, 8, 10), (3, 6, 14), (1, 2, 2), (1, 4, 16)])
    alone = np.concatenate([_features(params, [m]) for m in media])
    assert oracle.relative_error(_features(params, media), alone) < 1e-6
    assert _features(params, []).shape == (0, VISION.out_hidden_size)


def test_bfloat16_is_as_near_as_the_reference_is():
    reference = oracle.thinker(CONFIG).visual
    media = _media([(3, 6, 14), (1, 8, 10)])
    exact = _oracle(reference, media)
    reference.to(torch.bfloat16)
    theirs = oracle.rms_error(_oracle(reference, media), exact)
    ours = _features(oracle.params(reference, ["blocks"]), media, jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert oracle.rms_error(ours, exact) < 1.5 * theirs


def test_padding_has_no_influence(params):
    run = vision.vision_program(VISION)
    # 10 × 6 patches: two windows, both partial. One frame of padding completes four.
    (call,) = vision.vision_calls(VISION, _media([(3, 10, 6)]))
    pixels, positions, valid = call.inputs
    assert pixels.shape[:2] == (4, 128)
    assert valid.sum() == 180
    noise = np.random.default_rng(1).normal(size=pixels.shape).astype(np.float32)
    other = np.where(valid[..., None], pixels, noise)
    real = call.tokens >= 0
    a, b = (np.asarray(run(params, x, positions, valid)) for x in (pixels, other))
    np.testing.assert_array_equal(a[real], b[real])
    assert np.isfinite(a).all()


def test_a_second_input_of_the_bucket_compiles_nothing(params):
    _features(params, _media([(3, 6, 14), (1, 2, 2)]))
    with count_compiles() as n:
        # One window more or less full, in one and two windows; three or four frames; another order.
        _features(params, _media([(1, 6, 8), (4, 16, 8)]))
        _features(params, _media([(2, 8, 12), (1, 4, 10)]))
    assert n.value == 0


def test_layout_places_every_patch_once():
    for h, w in ((2, 2), (8, 8), (10, 22), (2, 40), (34, 6)):
        layout = vision.frame_layout(h, w, 8, 2)
        assert layout.valid.sum() == h * w
        groups = layout.groups[layout.groups >= 0]
        np.testing.assert_array_equal(np.sort(groups), np.arange(h * w // 4))
        row, col = layout.positions[layout.valid].T
        assert len({*zip(row.tolist(), col.tolist())}) == h * w
        np.testing.assert_array_equal((row // 2 * (w // 2) + col // 2)[::4], groups)
        windows = layout.valid.reshape(-1, 64).sum(1)
        assert (windows > 0).all()


def test_memory_does_not_grow_with_the_clip():
    run = vision.vision_program(VISION)
    shapes = jax.eval_shape(vision.VisionTower(VISION).init, jax.random.key(0), *vision.vision_shapes(VISION, 1, 1))
    params = shapes["params"]

    def largest(frames):
        # 24 × 26 patches: twelve windows, so 768 patches with the padding, and at most four frames a call.
        clip = (np.zeros((frames * 624, VISION.patch_dim), np.float32), (frames, 24, 26))
        calls = {c.inputs[0].shape: c.inputs for c in vision.vision_calls(VISION, [clip])}
        assert sum(np.prod(shape[:2]) for shape in calls) <= 2 * buckets.VISION_PATCHES
        return calls[max(calls)]

    short, long = largest(30), largest(60)
    assert short[0].shape == long[0].shape == (4, 768, VISION.patch_dim)
    temp = run.lower(params, *long).compile().memory_analysis().temp_size_in_bytes
    # The scores of one full layer over the clip would take 60 × 768² × 4 heads × 4 bytes = 540 MiB even per frame.
    assert temp < 50 * 2**20


def test_gradients_with_recomputed_layers_fit_finite_differences(params):
    run = vision.vision_program(VISION)
    (call,) = vision.vision_calls(VISION, _media([(4, 10, 6)]))

    def loss(features):
        return jnp.sum(jnp.sin(features[:, :4]))

    tower = vision.VisionTower(VISION, remat=True)
    gradient = jax.jit(jax.grad(lambda p: loss(tower.apply({"params": p}, *call.inputs))))(params)
    oracle.check_gradient(gradient, params, lambda p: loss(run(p, *call.inputs)))


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_full_size_parameters_have_the_published_names_and_shapes(name):
    cfg = C.preset(name).thinker.vision
    made = jax.eval_shape(vision.VisionTower(cfg).init, jax.random.key(0), *vision.vision_shapes(cfg, 1, 2))["params"]
    D, ff, O = 1280, 3420, {"3b": 2048, "7b": 3584}[name]

    def dense(out, into):
        return {"weight": (out, into), "bias": (out,)}

    block = {
        "norm1": {"weight": (D,)},
        "norm2": {"weight": (D,)},
        "attn": {n: dense(D, D) for n in ("q", "k", "v", "proj")},
        "mlp": {"gate_proj": dense(ff, D), "up_proj": dense(ff, D), "down_proj": dense(D, ff)},
    }
    expected = {
        "patch_embed": {"proj": {"weight": (D, 3, 2, 14, 14)}},
        "blocks": jax.tree.map(lambda s: (32, *s), block, is_leaf=lambda x: isinstance(x, tuple)),
        "merger": {"ln_q": {"weight": (D,)}, "mlp": {"0": dense(4 * D, 4 * D), "2": dense(O, 4 * D)}},
    }
    assert jax.tree.map(lambda x: x.shape, made) == expected
    if name == "3b":
        assert sum(x.size for x in jax.tree.leaves(made)) == 668_684_288


def test_the_largest_picture_fits_its_program():
    cfg = C.preset("3b").thinker.vision
    tower = vision.VisionTower(cfg)
    # 3584 × 3584 pixels: 65,536 patches in one frame, whose scores would be 256 GiB.
    inputs = vision.vision_shapes(cfg, 1, 1024, jnp.bfloat16)
    params = jax.eval_shape(tower.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    memory = jax.jit(lambda p, *x: tower.apply({"params": p}, *x)).lower(params, *inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 2**30


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"must be \(16, 1176\), not \(12, 1176\)"):
        list(vision.vision_calls(VISION, [(np.zeros((12, 1176), np.float32), (1, 4, 4))]))
    with pytest.raises(ValueError, match=r"grid \(1, 3, 4\) .* multiples of 2"):
        list(vision.vision_calls(VISION, [(np.zeros((12, 1176), np.float32), (1, 3, 4))]))
