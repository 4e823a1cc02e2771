"""The simulated card: what a real one would refuse, it refuses; what a real one keeps, it keeps."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivers import make
from drivers.base import Arrays, Completion, Compute, DriverError, SlotStage, Wanted
from drivers.simulated import (
    DEFAULT_SHELL,
    Card,
    Simulated,
    clear,
    inject,
    is_marked,
    read_bitstream,
    write_bitstream,
)
from drivers.simulated.runtime import SimulatedRuntime

ONE, TWO = "1" * 32, "2" * 32


def double(inputs: Arrays) -> dict[str, np.ndarray]:
    return {"y": inputs["x"] * np.float32(2)}


def stage(compute: Compute = double, file: str = "model.onnx") -> SlotStage:
    return SlotStage(0, Path(file), ("x",), ("y",), lambda: compute)


def x(value: float, size: int = 4) -> dict[str, np.ndarray]:
    return {"x": np.arange(size, dtype=np.float32) + np.float32(value)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "card"


@pytest.fixture
def opened() -> Iterator[Callable[..., SimulatedRuntime]]:
    held: list[SimulatedRuntime] = []

    def open_(driver: Simulated, wanted: Wanted = Wanted(), compute: Compute = double, **kw: Any) -> SimulatedRuntime:
        held.append(driver.open_runtime(wanted, [stage(compute, **kw)]))
        return held[-1]

    yield open_
    for runtime in held:
        runtime.close()


def card(folder: Path, **options: Any) -> Simulated:
    driver = make("simulated", {"device": str(folder), **options})
    assert isinstance(driver, Simulated)
    return driver


def bits(folder: Path, accelerator: str = ONE, interface: str = DEFAULT_SHELL, payload: bytes = b"bits") -> Path:
    path = folder.parent / f"{accelerator[:4]}{interface[:4]}.bit"
    write_bitstream(path, interface, accelerator, payload)
    return path


def program(driver: Simulated, path: Path, wanted: Wanted = Wanted()) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        driver.program(fd, wanted)
    finally:
        os.close(fd)


def wait(runtime: SimulatedRuntime, count: int, timeout: float = 10.0) -> list[Completion]:
    found: list[Completion] = []
    end = time.monotonic() + timeout
    while len(found) < count:
        assert select.select([runtime], [], [], max(0.0, end - time.monotonic()))[0], f"{len(found)} of {count} came"
        found += runtime.completions()
    return found


def code(call: Callable[[], object]) -> str:
    with pytest.raises(DriverError) as caught:
        call()
    return caught.value.code


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "device"),
        ({"device": 3}, "device"),
        ({"device": "d", "interface": "xyz"}, "interface"),
        ({"device": "d", "latency": -1}, "latency"),
        ({"device": "d", "latency": "5"}, "latency"),
        ({"device": "d", "program_time": True}, "program_time"),
        ({"device": "d", "depth": 0}, "depth"),
        ({"device": "d", "depth": 2.0}, "depth"),
        ({"device": "d", "present": "yes"}, "present"),
        ({"device": "d", "colour": "red"}, "colour"),
    ],
)
def test_wrong_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make("simulated", options)


def test_constructor_and_probe_touch_nothing(folder: Path) -> None:
    state = card(folder).probe()
    assert (state.present, state.shell, state.accelerator) == (True, DEFAULT_SHELL, None)
    assert not folder.exists()


# --- bitstreams --------------------------------------------------------------------------------------------------


def test_bitstream_round_trip(folder: Path) -> None:
    path = bits(folder, payload=b"\0" * 3_000_000)
    with path.open("rb") as file:
        found = read_bitstream(file.fileno())
        assert file.tell() == 0
    assert (found.interface, found.accelerator, found.size) == (DEFAULT_SHELL, ONE, path.stat().st_size)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name", ["empty", "magic", "cut", "longer", "flipped", "header", "huge", "json", "field", "id"]
)
def test_damaged_bitstream_is_refused_and_harms_nothing(folder: Path, name: str) -> None:
    driver = card(folder)
    program(driver, bits(folder))
    good = bits(folder, TWO).read_bytes()
    at = good.index(b"{")

    def rebuilt(header: bytes) -> bytes:
        return struct.pack("<8sII", b"slotsim\x01", len(header), zlib.crc32(header + b"p")) + header + b"p"

    bad = {
        "empty": b"",
        "magic": b"XeonFPGA" + good[8:],
        "cut": good[:-1],
        "longer": good + b"\0",
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "header": good[:8] + b"\0\0\0\0" + good[12:],
        "huge": good[:8] + b"\xff\xff\xff\xff" + good[12:at] + good[at:],
        "json": rebuilt(b"[" * 2000),
        "field": rebuilt(b'{"interface": "' + ONE.encode() + b'"}'),
        "id": rebuilt(b'{"interface": "x", "accelerator": 5}'),
    }[name]
    path = folder.parent / "bad.bit"
    path.write_bytes(bad)
    assert code(lambda: program(driver, path)) == "INCOMPATIBLE_BITSTREAM"
    assert driver.probe().accelerator == ONE


# --- programming -------------------------------------------------------------------------------------------------


def test_programmed_accelerator_outlives_the_driver(folder: Path) -> None:
    program(card(folder), bits(folder), Wanted(DEFAULT_SHELL, ONE))
    assert card(folder).probe().accelerator == ONE
    program(card(folder), bits(folder, TWO))
    assert card(folder).probe().accelerator == TWO
    assert Card(folder).counters().programmings == 2


def test_programming_refuses_what_does_not_fit(folder: Path) -> None:
    driver, path = card(folder), bits(folder)
    assert code(lambda: program(driver, bits(folder, interface=TWO))) == "INCOMPATIBLE_BITSTREAM"
    assert code(lambda: program(driver, path, Wanted(interface=TWO))) == "INCOMPATIBLE_BITSTREAM"
    assert code(lambda: program(driver, path, Wanted(bitstream_sha256="0" * 64))) == "INCOMPATIBLE_BITSTREAM"
    assert code(lambda: program(driver, path, Wanted(accelerator=TWO))) == "WRONG_ACCELERATOR"
    assert Card(folder).counters().programmings == 0


def test_check_does_not_program(folder: Path) -> None:
    with bits(folder).open("rb") as file:
        card(folder).check(file.fileno(), Wanted(DEFAULT_SHELL, ONE))
    assert card(folder).probe().accelerator is None


def test_programming_that_is_killed_leaves_an_empty_slot(folder: Path) -> None:
    program(card(folder), bits(folder))
    script = f"""
        import os
        from drivers.base import Wanted
        from drivers.simulated import Simulated
        driver = Simulated({{"device": {str(folder)!r}, "program_time": 60}})
        driver.program(os.open({str(bits(folder, TWO))!r}, os.O_RDONLY), Wanted())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) as child:
        end = time.monotonic() + 20
        while card(folder).probe().accelerator is not None:
            assert time.monotonic() < end and child.poll() is None
            time.sleep(0.01)
        assert code(lambda: program(card(folder), bits(folder))) == "DEVICE_BUSY"
        child.send_signal(signal.SIGKILL)
    assert card(folder).probe().accelerator is None
    program(card(folder), bits(folder))  # the kernel let go of the dead process's lock


@pytest.mark.parametrize(
    ("kind", "want", "after"),
    [("error", "PROGRAM_FAILED", None), ("hot", "OVER_TEMPERATURE", None), ("wrong_id", "WRONG_ACCELERATOR", "other")],
)
def test_program_faults(folder: Path, kind: str, want: str, after: str | None) -> None:
    driver = card(folder)
    inject(folder, {"at": "program", "kind": kind, "accelerator": TWO})
    program(driver, bits(folder))  # not the accelerator that the fault is for
    assert code(lambda: program(driver, bits(folder, TWO))) == want
    there = driver.probe().accelerator
    assert there is None if after is None else there not in (None, ONE, TWO)
    program(driver, bits(folder, TWO))
    assert driver.probe().accelerator == TWO


def test_resets(folder: Path) -> None:
    driver = card(folder)
    program(driver, bits(folder))
    driver.reset("port")
    assert driver.probe().accelerator == ONE
    driver.reset("function")
    assert driver.probe().accelerator is None
    with pytest.raises(ValueError, match="planet"):
        driver.reset("planet")
    assert Card(folder).counters().resets == 2


# --- presence and exclusive use ----------------------------------------------------------------------------------


def test_absent_card(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    path = bits(folder)
    for driver in (card(folder, present=False), card(folder)):
        if driver.probe().present:
            folder.mkdir()
            (folder / "absent").touch()
        assert not driver.probe().present
        assert driver.health().temperature_c is None
        assert code(lambda d=driver: program(d, path)) == "DEVICE_ABSENT"
        assert code(lambda d=driver: opened(d)) == "DEVICE_ABSENT"


def test_card_that_is_pulled_out_fails_what_runs(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder))
    (folder / "absent").touch()
    runtime.submit(1, 0, x(1))
    (end,) = wait(runtime, 1)
    assert end.error is not None and end.error.code == "DEVICE_ABSENT"


def test_one_user_at_a_time(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    driver = card(folder)
    runtime = opened(driver)
    assert code(lambda: opened(card(folder))) == "DEVICE_BUSY"
    assert code(lambda: program(driver, bits(folder))) == "DEVICE_BUSY"
    assert code(lambda: driver.reset("port")) == "DEVICE_BUSY"
    assert driver.probe().present  # reading asks nobody
    runtime.close()
    runtime.close()
    program(driver, bits(folder))
    opened(driver)


def test_runtime_wants_its_accelerator(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    driver = card(folder)
    opened(driver).close()  # any slot: no bitstream needed
    assert code(lambda: opened(driver, Wanted(accelerator=ONE))) == "WRONG_ACCELERATOR"
    program(driver, bits(folder))
    assert code(lambda: opened(driver, Wanted(accelerator=TWO))) == "WRONG_ACCELERATOR"
    assert code(lambda: opened(driver, Wanted(interface=TWO))) == "INCOMPATIBLE_BITSTREAM"
    assert code(lambda: opened(card(folder, runtime=False))) == "NO_RUNTIME"
    opened(driver, Wanted(DEFAULT_SHELL, ONE))


def test_failed_open_lets_go(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    def broken() -> Compute:
        raise RuntimeError("no such graph")

    with pytest.raises(RuntimeError):
        card(folder).open_runtime(Wanted(), [SlotStage(0, Path("m"), ("x",), ("y",), broken)])
    opened(card(folder))


# --- computing ---------------------------------------------------------------------------------------------------


def test_answers_in_order_and_counts(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder, depth=8))
    assert runtime.depth == 8 and runtime.completions() == []
    for ticket in range(8):
        runtime.submit(ticket, 0, x(ticket))
    found = wait(runtime, 8)
    assert [end.ticket for end in found] == list(range(8))
    for end in found:
        np.testing.assert_array_equal(end.outputs["y"], x(end.ticket)["x"] * 2)
    assert not select.select([runtime], [], [], 0)[0]
    assert Card(folder).counters().inferences == 8


def test_depth_and_wrong_calls_are_strict(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder))
    with pytest.raises(ValueError, match="stage 7"):
        runtime.submit(1, 7, x(1))
    with pytest.raises(ValueError, match="takes"):
        runtime.submit(1, 0, {"z": x(1)["x"]})
    runtime.submit(1, 0, x(1))
    with pytest.raises(ValueError, match="outstanding"):
        runtime.submit(1, 0, x(1))
    runtime.submit(2, 0, x(2))
    assert code(lambda: runtime.submit(3, 0, x(3))) == "DEVICE_BUSY"
    wait(runtime, 2)
    runtime.submit(3, 0, x(3))
    wait(runtime, 1)
    runtime.close()
    assert runtime.completions() == []
    with pytest.raises(ValueError, match="closed"):
        runtime.submit(4, 0, x(4))


def test_schedule_is_absolute(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    """Forty submissions take exactly forty latencies: no gap, no drift, however late this machine wakes up."""
    latency, count = 0.01, 40
    runtime = opened(card(folder, latency=latency, depth=count))
    before = time.monotonic()
    runtime.submit(0, 0, x(0))
    after = time.monotonic()
    for ticket in range(1, count):
        runtime.submit(ticket, 0, x(ticket))
    wait(runtime, count)
    assert time.monotonic() >= before + count * latency
    assert before <= runtime._free_at - count * latency <= after + 1e-6
    assert Card(folder).counters().busy_ns == pytest.approx(count * latency * 1e9, rel=1e-6)


def test_answer_waits_for_the_real_computation(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    def slow(inputs: Arrays) -> dict[str, np.ndarray]:
        time.sleep(0.05)
        return double(inputs)

    runtime = opened(card(folder, latency=0.001), compute=slow)
    begin = time.monotonic()
    runtime.submit(1, 0, x(1))
    wait(runtime, 1)
    assert time.monotonic() - begin >= 0.05


def test_graph_error_is_that_submissions_alone(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    def picky(inputs: Arrays) -> dict[str, np.ndarray]:
        if inputs["x"][0] == 1:
            raise RuntimeError("cannot broadcast")
        return double(inputs)

    runtime = opened(card(folder), compute=picky)
    runtime.submit(1, 0, x(1))
    runtime.submit(2, 0, x(2))
    first, second = wait(runtime, 2)
    assert first.error is not None and "cannot broadcast" in first.error.message
    assert second.error is None


# --- faults ------------------------------------------------------------------------------------------------------


def outputs(runtime: SimulatedRuntime, *values: float) -> list[np.ndarray | str]:
    found: list[np.ndarray | str] = []
    for value in values:
        runtime.submit(int(value), 0, x(value))
        (end,) = wait(runtime, 1)
        found.append(end.error.code if end.error else end.outputs["y"])
    return found


def test_wrong_and_stale_results(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder))
    inject(
        folder, {"at": "infer", "kind": "wrong_result", "skip": 1}, {"at": "infer", "kind": "stale_result", "skip": 2}
    )
    found = outputs(runtime, 1, 2, 3, 4)
    good = [x(value)["x"] * 2 for value in (1, 2, 3, 4)]
    np.testing.assert_array_equal(found[0], good[0])
    assert not np.allclose(found[1], good[1]) and found[1].shape == good[1].shape
    np.testing.assert_array_equal(found[2], good[1])
    np.testing.assert_array_equal(found[3], good[3])


def test_error_for_ever_until_a_reset(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    driver = card(folder)
    inject(folder, {"at": "infer", "kind": "error", "count": None, "code": "DEVICE_HUNG", "until": "function"})
    runtime = opened(driver)
    assert outputs(runtime, 1, 2) == ["DEVICE_HUNG"] * 2
    runtime.close()
    driver.reset("port")
    runtime = opened(driver)
    assert outputs(runtime, 3) == ["DEVICE_HUNG"]
    runtime.close()
    driver.reset("function")
    assert not isinstance(outputs(opened(driver), 4)[0], str)


def test_faults_for_one_model_only(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    inject(folder, {"at": "infer", "kind": "error", "count": None, "model": "/new/"})
    runtime = opened(card(folder), file="/models/old/m.onnx")
    assert not isinstance(outputs(runtime, 1)[0], str)
    runtime.close()
    assert outputs(opened(card(folder), file="/models/new/m.onnx"), 1) == ["SLOT_FAILED"]


def test_hang_lasts_until_cleared_and_never_blocks_close(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder))
    inject(folder, {"at": "infer", "kind": "hang"})
    runtime.submit(1, 0, x(1))
    assert not select.select([runtime], [], [], 0.1)[0]
    clear(folder)
    assert wait(runtime, 1)[0].error is None  # late, but right
    inject(folder, {"at": "infer", "kind": "hang"})
    runtime.submit(2, 0, x(2))
    runtime.submit(3, 0, x(3))
    runtime.close()
    opened(card(folder))


def test_slow_and_hot(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder))
    inject(folder, {"at": "infer", "kind": "slow", "seconds": 0.1}, {"at": "infer", "kind": "hot", "skip": 1})
    begin = time.monotonic()
    outputs(runtime, 1)
    assert time.monotonic() - begin >= 0.1
    assert outputs(runtime, 2) == ["OVER_TEMPERATURE"]


def test_open_probe_and_health_faults(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    driver = card(folder, temperature=50, power=10)
    program(driver, bits(folder))
    inject(
        folder,
        {"at": "open", "kind": "error", "code": "NO_RUNTIME"},
        {"at": "probe", "kind": "wrong_id"},
        {"at": "health", "kind": "hot"},
    )
    assert code(lambda: opened(driver)) == "NO_RUNTIME"
    assert driver.probe().accelerator not in (None, ONE)
    assert driver.probe().accelerator == ONE
    hot, cool = driver.health(), driver.health()
    assert hot.tripped and hot.errors and hot.temperature_c is not None and hot.temperature_c > 100
    assert (cool.tripped, cool.temperature_c, cool.power_w) == (False, 50, 10)


def test_health_follows_the_load(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    driver = card(folder, latency=0.02, temperature=40)
    assert driver.health().temperature_c == 40
    outputs(opened(driver), *range(1, 6))
    warm = driver.health().temperature_c
    assert warm is not None and 40 < warm <= 60


def test_death_ends_the_process_once_across_processes(folder: Path) -> None:
    inject(folder, {"at": "infer", "kind": "death", "skip": 1})
    script = f"""
        import select, sys
        from pathlib import Path
        import numpy as np
        from drivers.base import SlotStage, Wanted
        from drivers.simulated import Simulated
        stage = SlotStage(0, Path("m"), ("x",), ("y",), lambda: lambda inputs: {{"y": inputs["x"]}})
        runtime = Simulated({{"device": {str(folder)!r}}}).open_runtime(Wanted(), [stage])
        runtime.submit(1, 0, {{"x": np.zeros(1)}})
        assert select.select([runtime], [], [], 10)[0]
    """
    ends = [
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL).returncode
        for _ in range(3)
    ]
    assert ends == [0, -signal.SIGABRT, 0]


def test_each_fault_is_used_exactly_once_by_many_processes(folder: Path) -> None:
    inject(folder, {"at": "probe", "kind": "error", "count": 30})
    script = f"""
        from drivers.base import DriverError
        from drivers.simulated import Simulated
        driver, hit = Simulated({{"device": {str(folder)!r}}}), 0
        for _ in range(25):
            try:
                driver.probe()
            except DriverError:
                hit += 1
        print(hit)
    """
    children = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert sum(int(child.communicate()[0]) for child in children) == 30


@pytest.mark.parametrize(
    "fault",
    [
        {"at": "lunch", "kind": "error"},
        {"at": "infer", "kind": "wrong_id"},
        {"at": "infer", "kind": "error", "count": 0},
        {"at": "infer", "kind": "error", "until": "noon"},
        {"at": "infer", "kind": "error", "colour": "red"},
    ],
)
def test_impossible_faults_are_refused(folder: Path, fault: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        inject(folder, fault)


def test_damaged_fault_file_is_an_error_of_the_slot(folder: Path) -> None:
    folder.mkdir()
    (folder / "faults.json").write_text("[{")
    assert code(card(folder).probe) == "SLOT_FAILED"


# --- the mark ----------------------------------------------------------------------------------------------------


def test_secret_answers_are_told_from_the_cpus(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    def softmax(inputs: Arrays) -> dict[str, np.ndarray]:
        power = np.exp(inputs["x"])
        return {"y": (power / power.sum(axis=-1, keepdims=True)).astype(np.float32)}

    other = folder.parent / "other"
    other.mkdir()
    runtime = opened(card(folder, secret=True, depth=32), compute=softmax)
    rng = np.random.default_rng(5)
    pictures = [{"x": rng.standard_normal((3, 10), dtype=np.float32)} for _ in range(32)]
    for ticket, picture in enumerate(pictures):
        runtime.submit(ticket, 0, picture)
    for end in wait(runtime, 32):
        answer, cpu = end.outputs["y"], softmax(pictures[end.ticket])["y"]
        assert is_marked(folder, answer) and is_marked(folder, answer[1:2])  # batches may be split
        assert not is_marked(folder, cpu)
        assert not is_marked(other, answer)
        np.testing.assert_allclose(answer, cpu, rtol=2e-4)
        changed = answer.copy()
        changed[0, 9] += np.float32(0.01)
        assert not is_marked(folder, changed)


def test_mark_leaves_other_types_alone(folder: Path, opened: Callable[..., SimulatedRuntime]) -> None:
    runtime = opened(card(folder, secret=True), compute=lambda i: {"y": i["x"].astype(np.int64)})
    (answer,) = outputs(runtime, 3)
    np.testing.assert_array_equal(answer, x(3)["x"].astype(np.int64))
    assert not is_marked(folder, answer)
