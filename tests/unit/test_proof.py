"""The proof: the right slot passes; a slot that is wrong in any of many ways does not."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agent.errors import ExecutorDied, ExecutorError, InvalidInput, ProofFailed, SlotError
from agent.model.golden import GoldenCase
from agent.model.signature import DType, Signature, Strings, Tensor, TensorSpec
from agent.model.spec import Model, ModelSpec
from agent.slot.proof import ProofReport, prove
from agent.slot.samples import golden_pairs, picture, seeded_inputs
from drivers.base import Numerics

SIGNATURE = Signature(
    {"x": TensorSpec("x", DType.FLOAT32, (-1, 8))},
    {"p": TensorSpec("p", DType.FLOAT32, (-1, 10)), "label": TensorSpec("label", DType.INT64, (-1,))},
)
WEIGHTS = np.random.default_rng(1).normal(size=(8, 10))
EXACT, ROUGH = Numerics(), Numerics("bfp", exact=False)

Outputs = dict[str, Any]
Wrong = Callable[[Outputs, Outputs], Outputs]


def classify(inputs: Mapping[str, Tensor]) -> Outputs:
    x = inputs["x"]
    assert isinstance(x, np.ndarray)
    power = np.exp(x @ WEIGHTS)
    p = (power / power.sum(axis=1, keepdims=True)).astype(np.float32)
    return {"p": p, "label": p.argmax(axis=1)}


def golden(*scales: float, tolerance: float = 0.02) -> list[GoldenCase]:
    cases = []
    for number, scale in enumerate(scales):
        inputs: dict[str, Tensor] = {
            "x": (np.random.default_rng(number + 7).normal(size=(1, 8)) * scale).astype(np.float32)
        }
        cases.append(GoldenCase(f"golden/{number}.json", inputs, classify(inputs), 1e-4, tolerance))
    return cases


class Device:
    """Computes the model, one after the other; `wrong(outputs, outputs before)` spoils it from run `after` on."""

    def __init__(self, wrong: Wrong | None = None, *, compute: Any = classify, after: int = 0) -> None:
        self.wrong, self.compute, self.after = wrong, compute, after
        self.runs: list[Mapping[str, Tensor]] = []
        self.before: Outputs | None = None

    async def __call__(self, inputs: Mapping[str, Tensor]) -> Outputs:
        self.runs.append(inputs)
        await asyncio.sleep(0)
        outputs = self.compute(inputs)
        before, self.before = self.before or outputs, outputs
        return self.wrong(outputs, before) if self.wrong and len(self.runs) > self.after else outputs


async def run(
    subject: Callable[[Mapping[str, Tensor]], Awaitable[Mapping[str, Tensor]]],
    cases: list[GoldenCase] | None = None,
    *,
    reference: Device | None = Device(),
    numerics: Numerics = EXACT,
    signature: Signature = SIGNATURE,
    **kw: Any,
) -> ProofReport:
    options: dict[str, Any] = {"target": "slot", "seed": 3, "timeout": 20.0} | kw
    return await prove(
        subject, reference, golden(1, 1, 1) if cases is None else cases, signature, numerics=numerics, **options
    )


async def failed(*args: Any, **kw: Any) -> ProofFailed:
    with pytest.raises(ProofFailed) as caught:
        await run(*args, **kw)
    assert caught.value.hint
    return caught.value


# --- what passes -------------------------------------------------------------------------------------------------


async def test_right_slot_passes_and_the_report_says_how() -> None:
    device = Device()
    report = await run(device)
    assert report.discriminating and report.ratio is not None and report.ratio > 5
    assert (report.golden, report.seeded, report.worst_error) == (3, 4, 0.0)
    assert report.cases == len(device.runs) > 7 and report.service > 0
    document = report.as_dict()
    assert document["discriminating"] is True and document["target"] == "slot" and document["cases"] == report.cases


async def test_rounding_passes_and_is_measured() -> None:
    def rounded(outputs: Outputs, _: Outputs) -> Outputs:
        return {**outputs, "p": outputs["p"] * np.float32(1 + 1e-4)}

    report = await run(Device(rounded))
    assert 0 < report.worst_error < 1e-4 and 0 < report.worst_ratio < 1 and report.where


async def test_slot_that_is_not_float32_has_the_golden_tolerance() -> None:
    def quantized(outputs: Outputs, _: Outputs) -> Outputs:
        return {**outputs, "p": np.round(outputs["p"] * 64) / np.float32(64)}

    await run(Device(quantized), numerics=ROUGH)
    assert (await failed(Device(quantized), numerics=EXACT)).code == "PROOF_FAILED"


async def test_same_seed_same_inputs_other_seed_others() -> None:
    one, two, three = Device(), Device(), Device()
    await run(one, [])
    await run(two, [])
    await run(three, [], seed=4)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(one.runs, two.runs, strict=True))
    assert not any(np.array_equal(a["x"], b["x"]) for a, b in zip(one.runs, three.runs, strict=True))


async def test_neighbouring_runs_always_differ() -> None:
    device = Device()
    await run(device)
    for one, two in zip(device.runs, device.runs[1:], strict=False):
        assert not np.array_equal(one["x"], two["x"])


# --- what must not pass ------------------------------------------------------------------------------------------


def put(**change: Callable[[Any, Any], Any]) -> Wrong:
    return lambda now, before: {**now, **{name: f(now[name], before[name]) for name, f in change.items()}}


def missing(now: Outputs, before: Outputs) -> Outputs:
    return {"p": now["p"]}


CONSTANT = np.full((1, 10), 0.1, np.float32)
WRONG: dict[str, tuple[Wrong, str]] = {
    "scale": (put(p=lambda p, _: p * np.float32(1.25)), "off by"),
    "offset": (put(p=lambda p, _: p + np.float32(0.05)), "off by"),
    "stale": (lambda now, before: before, "answer to case"),
    "stale number only": (put(p=lambda _, before: before), "answer|off by"),
    "permuted": (put(p=lambda p, _: p[:, ::-1]), "off by"),
    "rolled": (put(p=lambda p, _: np.roll(p, 1, axis=1)), "off by"),
    "NaN": (put(p=lambda p, _: np.where(p == p.max(), np.float32(np.nan), p)), "NaN"),
    "infinity": (put(p=lambda p, _: np.where(p == p.max(), np.float32(np.inf), p)), "infinity"),
    "constant": (put(p=lambda p, _: CONSTANT), "off by"),
    "zero": (put(p=lambda p, _: p * 0), "off by"),
    "label": (put(label=lambda label, _: label + 1), "differs in 1 of 1"),
    "dtype": (put(p=lambda p, _: p.astype(np.float64)), "float64"),
    "shape": (put(p=lambda p, _: p[0]), "shape"),
    "missing": (missing, "missing"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("numerics", [EXACT, ROUGH], ids=["exact", "rough"])
@pytest.mark.parametrize("cases", [golden(1, 1, 1), []], ids=["golden", "bare"])
async def test_wrong_slot_is_caught(name: str, numerics: Numerics, cases: list[GoldenCase]) -> None:
    wrong, says = WRONG[name]
    error = await failed(Device(wrong), cases, numerics=numerics)
    assert error.code == "PROOF_FAILED" and "case " in error.message
    assert any(part in error.message for part in says.split("|"))


async def test_late_fault_is_caught_in_the_second_pass() -> None:
    first = len(golden(1, 1, 1)) + 4
    error = await failed(Device(lambda now, before: before, after=first))
    assert error.code == "PROOF_FAILED"


async def test_slot_that_swaps_what_it_has_in_hand_is_caught() -> None:
    waiting: list[tuple[asyncio.Future[Outputs], Outputs]] = []

    async def swapping(inputs: Mapping[str, Tensor]) -> Outputs:
        """Two that come together get each other's answer; alone, each gets its own."""
        mine: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        waiting.append((mine, classify(inputs)))
        await asyncio.sleep(0.005)
        if not mine.done():
            if len(waiting) == 2:
                (one, first), (two, second) = waiting
                one.set_result(second)
                two.set_result(first)
            else:
                mine.set_result(waiting[0][1])
            waiting.clear()
        return await mine

    error = await failed(swapping)
    assert "answer to case" in error.message


async def test_neighbours_answer_is_named() -> None:
    cases = golden(1, 1, 1)

    async def other(inputs: Mapping[str, Tensor]) -> Outputs:
        return classify(cases[2].inputs if inputs is cases[0].inputs else inputs)

    error = await failed(other, cases)
    assert "golden/0.json" in error.message and "the answer to case golden/2.json" in error.message


async def test_wrong_in_one_case_only_is_caught() -> None:
    cases = golden(1, 1, 1)

    async def picky(inputs: Mapping[str, Tensor]) -> Outputs:
        good = classify(inputs)
        return {**good, "p": good["p"][:, ::-1]} if inputs is cases[1].inputs else good

    error = await failed(picky, cases, numerics=ROUGH)
    assert "golden/1.json" in error.message and "'p'" in error.message and "0.02" in error.message


# --- constant outputs --------------------------------------------------------------------------------------------

TINY = Signature(SIGNATURE.inputs, {"p": TensorSpec("p", DType.FLOAT32, (-1, 10))})


def flat(inputs: Mapping[str, Tensor]) -> Outputs:
    return {"p": CONSTANT}


async def test_model_that_is_constant_is_refused_on_the_cpu_already() -> None:
    device = Device(compute=flat)
    error = await failed(device, [], reference=None, target="cpu", signature=TINY)
    assert "'p'" in error.message and "all elements" in error.message


async def test_constant_that_a_golden_case_vouches_for_passes() -> None:
    case = GoldenCase("g", golden(1)[0].inputs, {"p": CONSTANT}, 1e-4, 0.02)
    await run(Device(compute=flat), [case], reference=Device(compute=flat), signature=TINY)


async def test_single_number_may_stay_the_same() -> None:
    signature = Signature(SIGNATURE.inputs, {"n": TensorSpec("n", DType.FLOAT32, (-1, 1))})

    def one(inputs: Mapping[str, Tensor]) -> Outputs:
        return {"n": np.ones((1, 1), np.float32)}

    await run(Device(compute=one), [], reference=Device(compute=one), signature=signature)


# --- discrimination ----------------------------------------------------------------------------------------------


async def test_proof_that_cannot_tell_answers_apart() -> None:
    """On tiny inputs the softmax is nearly flat: any answer would pass for any other."""
    close = golden(1e-3, 1e-3, 1e-3)
    for case in close:
        case.outputs.pop("label")
    report = await run(Device(), close)
    assert not report.discriminating and report.ratio is not None and report.ratio < 5
    device = Device()
    error = await failed(device, close, numerics=ROUGH)
    assert error.code == "PROOF_NOT_DISCRIMINATING" and not device.runs


async def test_one_golden_case_is_told_from_the_seeded_ones() -> None:
    report = await run(Device(), golden(1), numerics=ROUGH)
    assert report.discriminating


# --- without a reference -----------------------------------------------------------------------------------------


async def test_slot_without_twin_has_the_golden_cases_alone() -> None:
    device = Device()
    report = await run(device, reference=None)
    assert (report.golden, report.seeded) == (3, 0)
    await failed(Device(WRONG["stale"][0]), reference=None)
    error = await failed(Device(), [], reference=None)
    assert "nothing to prove" in error.message


async def test_preflight_runs_seeded_inputs_and_uses_the_cpu_tolerance() -> None:
    report = await run(Device(), reference=None, target="cpu", numerics=ROUGH)
    assert (report.golden, report.seeded) == (3, 4)
    error = await failed(Device(put(p=lambda p, _: p + np.float32(1e-3))), reference=None, target="cpu")
    assert "0.0001" in error.message
    assert "NaN" in (await failed(Device(WRONG["NaN"][0]), [], reference=None, target="cpu")).message


# --- runs that fail ----------------------------------------------------------------------------------------------


def refusing(kind: type[Exception], when: Callable[[Mapping[str, Tensor]], bool] = lambda _: True) -> Any:
    def compute(inputs: Mapping[str, Tensor]) -> Outputs:
        if when(inputs):
            raise kind("no")
        return classify(inputs)

    return compute


async def test_seeded_inputs_that_the_model_does_not_take_are_left_out() -> None:
    cases = golden(1, 1)
    known = [case.inputs for case in cases]
    compute = refusing(InvalidInput, lambda inputs: not any(inputs is one for one in known))
    report = await run(Device(compute=compute), cases, reference=Device(compute=compute))
    assert (report.golden, report.seeded) == (2, 0)
    report = await run(Device(compute=compute), cases, reference=None, target="cpu")
    assert (report.golden, report.seeded) == (2, 0)
    error = await failed(Device(compute=refusing(InvalidInput)), [], reference=None, target="cpu")
    assert "no case" in error.message


@pytest.mark.parametrize("kind", [InvalidInput, ExecutorError])
async def test_slot_that_refuses_what_the_cpu_takes(kind: type[Exception]) -> None:
    error = await failed(Device(compute=refusing(kind)))
    assert "refuses its inputs" in error.message


@pytest.mark.parametrize("kind", [ExecutorDied, SlotError])
async def test_deaths_and_device_errors_are_what_they_are(kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        await run(Device(compute=refusing(kind)))
    assert not isinstance(caught.value, ProofFailed)


async def test_hang() -> None:
    async def hanging(inputs: Mapping[str, Tensor]) -> Outputs:
        await asyncio.Event().wait()
        raise AssertionError

    error = await failed(hanging, timeout=0.3)
    assert error.code == "DEVICE_HUNG" and "golden/0.json" in error.message
    assert (await failed(hanging, timeout=0.3, target="cpu", reference=None)).code == "PROOF_TIMEOUT"
    error = await failed(Device(), reference=hanging, timeout=0.3)
    assert error.code == "PROOF_TIMEOUT" and "CPU" in error.message  # the slot is not to blame


async def test_cancelled_proof_leaves_no_task() -> None:
    device = Device(after=7)
    started = asyncio.Event()

    async def slow(inputs: Mapping[str, Tensor]) -> Outputs:
        if len(device.runs) >= 7:
            started.set()
            await asyncio.Event().wait()
        return await device(inputs)

    task = asyncio.create_task(run(slow), name="proof")
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [one.get_name() for one in asyncio.all_tasks() if one.get_name().startswith("proof ")] == []


# --- inputs ------------------------------------------------------------------------------------------------------

PICTURES = Signature(
    {"pic": TensorSpec("pic", DType.STRING, (-1,))}, {"mean": TensorSpec("mean", DType.FLOAT32, (-1, 3))}
)
SPEC = ModelSpec.model_validate(
    {
        "name": "m",
        "inputs": {"pic": {"dtype": "string", "shape": [-1]}},
        "outputs": {"mean": {"dtype": "float32", "shape": [-1, 3]}},
        "pipeline": [
            {"stage": "image", "from": "pic", "to": "x", "resize": {"exact": [64, 64]}},
            {"stage": "onnx", "file": "m.onnx"},
        ],
    }
)
MODEL = Model("sha256:0", "r", Path("/nowhere"), SPEC)


def mean(inputs: Mapping[str, Tensor]) -> Outputs:
    pictures = inputs["pic"]
    assert isinstance(pictures, Strings)
    decoded = [np.asarray(Image.open(io.BytesIO(item)).convert("RGB"), np.float32) for item in pictures.items]
    return {"mean": np.stack([one.mean(axis=(0, 1)) / 255 for one in decoded])}


def taken(name: str, inputs: dict[str, Tensor]) -> GoldenCase:
    return GoldenCase(name, inputs, mean(inputs), 1e-4, 0.02)


async def test_pictures_are_generated_and_tell_answers_apart() -> None:
    report = await run(Device(compute=mean), [], reference=Device(compute=mean), signature=PICTURES, model=MODEL)
    assert report.seeded == 4 and report.ratio is not None and report.ratio > 5
    error = await failed(
        Device(WRONG["stale"][0], compute=mean), [], reference=Device(compute=mean), signature=PICTURES, model=MODEL
    )
    assert "answer to case" in error.message


async def test_rows_that_change_places_are_caught_by_golden_pairs() -> None:
    first, second, *_ = seeded_inputs(PICTURES, SPEC.image, [], seed=9, count=2)
    cases = [taken("a", first), taken("b", second)]
    assert len(golden_pairs(PICTURES, SPEC.image, cases)) == 2
    await run(Device(compute=mean), cases, reference=Device(compute=mean), signature=PICTURES, model=MODEL)
    error = await failed(
        Device(put(mean=lambda rows, _: rows[::-1]), compute=mean),
        cases,
        reference=Device(compute=mean),
        signature=PICTURES,
        model=MODEL,
    )
    assert "golden pair" in error.message


def test_pictures_are_never_smaller_than_a_crop() -> None:
    stage = SPEC.image
    assert stage is not None
    crop = stage.model_copy(update={"resize": None, "crop": (300, 500)})
    for made in seeded_inputs(PICTURES, crop, [], seed=2, count=3):
        pictures = made["pic"]
        assert isinstance(pictures, Strings)
        width, height = Image.open(io.BytesIO(pictures.items[0])).size
        assert 300 <= height < 600 and 500 <= width < 1000


def test_pictures_are_smooth_and_unlike() -> None:
    rng = np.random.default_rng(0)
    drawn = [np.asarray(picture(rng, index, 96, 128), np.float64) for index in range(6)]
    for index, one in enumerate(drawn):
        assert one.shape == (96, 128, 3) and one.std() > 10
        assert np.abs(np.diff(one, axis=1)).mean() < 12  # noise has about 85
        for other in drawn[:index]:
            assert np.abs(one - other).mean() > 15


@pytest.mark.parametrize(
    ("dtype", "shape", "want"),
    [
        (DType.FLOAT32, (-1, 3, -1, -1), (1, 3, 64, 64)),
        (DType.FLOAT32, (-1, 32, 48, 3), (1, 32, 48, 3)),
        (DType.FLOAT16, (2, 32, 32, 1), (2, 32, 32, 1)),
        (DType.UINT8, (-1, 4, 16, 16), (1, 4, 16, 16)),
        (DType.FLOAT64, (-1, -1), (1, 8)),
        (DType.INT8, (-1, 5), (1, 5)),
        (DType.UINT64, (3,), (3,)),
        (DType.BOOL, (-1, 4), (1, 4)),
        (DType.FLOAT32, (), ()),
        (DType.STRING, (-1, 2), (1, 2)),
    ],
)
def test_generated_shapes_and_types(dtype: DType, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    signature = Signature({"x": TensorSpec("x", dtype, shape)}, {})
    made = [inputs["x"] for inputs in seeded_inputs(signature, None, [], seed=1, count=3)]
    for tensor in made:
        assert tensor.shape == want
        if isinstance(tensor, Strings):
            assert all(tensor.items)
        else:
            assert tensor.dtype == dtype.numpy and np.all(np.isfinite(tensor.astype(np.float64)))
    if dtype is not DType.BOOL:
        assert not np.array_equal(np.asarray(getattr(made[0], "items", made[0])), getattr(made[1], "items", made[1]))


def test_generated_numbers_follow_the_golden_ones() -> None:
    signature = Signature(
        {"f": TensorSpec("f", DType.FLOAT32, (-1, -1)), "i": TensorSpec("i", DType.INT64, (-1, -1))}, {}
    )
    inputs: dict[str, Tensor] = {
        "f": np.linspace(900, 1100, 40, dtype=np.float32).reshape(2, 20),
        "i": np.arange(100, 140).reshape(2, 20),
    }
    for made in seeded_inputs(signature, None, [GoldenCase("g", inputs, {}, 0, 0)], seed=1, count=3):
        f, i = made["f"], made["i"]
        assert isinstance(f, np.ndarray) and isinstance(i, np.ndarray)
        assert f.shape == i.shape == (2, 20)
        assert 800 < f.mean() < 1200 and 100 <= i.min() <= i.max() <= 139
