"""The same rows from workers in a cluster of Ray, whatever becomes of these; run by hand where Ray is installed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.errors import BenchError, ConfigError
from bench.measure.pipeline import Pipeline
from bench.results.store import Store
from bench.run.choice import choose
from bench.run.executor import Local
from bench.run.on_ray import OnRay
from bench.run.runner import run
from bench.system.parcel import pack, unpack_elsewhere
from bench.system.user_code import load
from tests.test_cli import MODEL
from tests.test_executors import OWN, Listening, begun, files, gone, hanging, run_in
from tests.test_runner import grid

CPU = torch.device("cpu")
OLD = "ignore::Warning"  # of the library's own
SLOWLY = OWN.replace("        oracle.scores(x)\n", "        time.sleep(0.3)\n        oracle.scores(x)\n")


@pytest.fixture
def ray():
    """The library, with nothing of it left running."""
    library = pytest.importorskip("ray", reason="Ray is not installed")
    yield library
    library.shutdown()


def given(folder, n=10, own=OWN):
    """Cells of a user's file, one of which ends its worker once, and cells that share a training."""
    file = folder / "own.py"
    file.write_text(MODEL + own)
    attacks = [f"{file}:Attack(do={what})" for what in ("ask", "end-once")]
    tasks = grid(model=[f"{file}:Means"], attack=attacks, n=n, queries=3)
    return tasks + grid(model=["cnn(width=4)"], attack=["noise"], defense=["pgd-at(epochs=1, steps=1)"], n=n, queries=3)


def below(pid):
    """The processes that ``pid`` has begun, by their ids, with the command of each."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        for child in [child for child, its in parents.items() if its == parent]:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            todo.append(child)
    return found


def same(one, other):
    mine, theirs = files(one), files(other)
    assert mine.keys() == theirs.keys()
    assert mine == theirs


def test_only_ray_has_an_address():
    with pytest.raises(ConfigError, match="--address a:6379 is where a Ray cluster is; use --executor ray"):
        choose("processes", [CPU], 2, None, "a:6379")


def test_a_users_file_has_to_be_there_as_it_is_here(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("class Mine: pass\n")
    parcel = pack(load(file).Mine())
    assert type(unpack_elsewhere(parcel)).__name__ == "Mine"
    file.write_text("class Mine: other = 1\n")
    with pytest.raises(ConfigError, match=r"own.py is not there, or is another one"):
        unpack_elsewhere(parcel)


@pytest.mark.slow
@pytest.mark.filterwarnings(OLD)
def test_rows_are_equal_when_a_worker_and_a_place_are_killed(tmp_path, ray):
    tasks = given(tmp_path, own=SLOWLY)
    class Killing(Listening):
        killed = 0

        def start(self, task, unit):
            super().start(task, unit)
            places = [pid for pid, command in below(os.getpid()).items() if command.startswith("ray::Place")]
            if not self.killed and len(self.begun) == 2:
                os.kill(places[0], signal.SIGKILL)
                self.killed = places[0]

    told, folder = Killing(), tmp_path / "there"
    pipeline = Pipeline(folder / "networks", CPU, 64)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    outcome = run(tasks, Store(folder).open(), pipeline, 5, 64, told, examples=True, executor=OnRay(None, 2, "cpu"))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert told.killed
    assert (outcome.ran, outcome.failed) == (3, 0)
    run_in(tmp_path / "here", tasks, Local())  # which end-once ends no more
    same(tmp_path / "there", tmp_path / "here")
    assert not ray.is_initialized()
    assert not [pid for pid, command in below(os.getpid()).items() if "ray" in command]


@pytest.mark.slow
@pytest.mark.filterwarnings(OLD)
def test_data_and_networks_are_put_into_the_object_store_once(tmp_path, ray, monkeypatch):
    put, sizes = ray.put, []

    def counted(value):
        sizes.append({name: len(file) for name, file in value.items()} if isinstance(value, dict) else len(value))
        return put(value)

    monkeypatch.setattr(ray, "put", counted)
    file = tmp_path / "own.py"
    file.write_text(MODEL + SLOWLY)
    trained = {"defense": ["pgd-at(epochs=1, steps=1)"], "queries": 3, "n": 100}
    tasks = grid(model=["cnn(width=4)"], attack=[f"{file}:Attack(do=ask)"], **trained)
    _, outcome, told = run_in(tmp_path, tasks, OnRay(None, 2, "cpu"))
    assert (outcome.ran, outcome.failed) == (1, 0)
    assert (len(told.made), len(told.begun)) == (1, 20)
    data, network = sizes  # for the worker that has not made it
    assert data > sum(images.numel() for images in (tasks[0].data.train.images, tasks[0].data.test.images))
    (ours,) = (tmp_path / "networks").glob("*.safetensors")
    assert network[ours.name] == ours.stat().st_size


@pytest.mark.slow
@pytest.mark.filterwarnings(OLD)
def test_rows_are_equal_when_a_machine_is_lost(tmp_path, ray):
    from ray.cluster_utils import Cluster

    file = tmp_path / "own.py"
    file.write_text(MODEL + SLOWLY)
    tasks = grid(model=[f"{file}:Means"], attack=[f"{file}:Attack(do=ask)"], n=30, queries=3)
    tasks += grid(model=["cnn(width=4)"], attack=["noise"], defense=["pgd-at(epochs=1, steps=1)"], n=10, queries=3)
    run_in(tmp_path / "here", tasks, Local())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    machine = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()

        class Removing(Listening):
            removed = False

            def start(self, task, unit):
                super().start(task, unit)
                if not self.removed and len(self.begun) >= 4:
                    cluster.remove_node(machine, allow_graceful=False)
                    self.removed = True

        told, folder = Removing(), tmp_path / "there"
        pipeline = Pipeline(folder / "networks", CPU, 64)
        asked = OnRay(cluster.address, 2, "cpu")
        outcome = run(tasks, Store(folder).open(), pipeline, 5, 64, told, examples=True, executor=asked)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert told.removed
    assert (outcome.ran, outcome.failed) == (2, 0)
    same(tmp_path / "there", tmp_path / "here")
    units = told.made + told.begun
    assert len(units) == len(set(units)) + 1  # one was lost with the machine


@pytest.mark.slow
@pytest.mark.filterwarnings(OLD)
def test_a_unit_that_hangs_is_ended_and_has_failed(tmp_path, ray):
    file = tmp_path / "own.py"
    file.write_text(MODEL + OWN)
    tasks = grid(model=[f"{file}:Means"], attack=[f"{file}:Attack(do=hang)"], n=5, queries=3)
    store, outcome, _ = run_in(tmp_path / "out", tasks, OnRay(None, 1, "cpu"), unit_timeout=3.0)
    assert outcome.failed == 1
    (error,) = store.row(tasks[0].cell).errors
    assert error == "the last of its output:\njust a moment\nit took longer than 3 s, so its worker was ended"
    (pid,) = [int(mark.name.partition("-")[2]) for mark in tmp_path.glob("hangs-*")]
    time.sleep(1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings(OLD)
def test_more_workers_than_there_is_room_for_are_refused(ray, tmp_path):
    ray.init(num_cpus=1, address="local", include_dashboard=False, log_to_driver=False)
    with pytest.raises(BenchError, match=r"there is room for 1 workers in the cluster \(CPU\), not for 2"):
        run_in(tmp_path, given(tmp_path), OnRay(None, 2, "cpu"))


@pytest.fixture
def guarded(tmp_path, ray):
    """The home folder and the address of a cluster here that asks for a token."""
    home, port = tmp_path / "home", 6400 + os.getpid() % 1000
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    asked = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
             "--node-ip-address=127.0.0.1", "--num-cpus=1", "--include-dashboard=false"]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (tmp_path / "head.log").open("w") as said:
        head = subprocess.Popen(asked, env={**clean, "HOME": str(home)}, stdout=said, stderr=said)
    try:
        while "runtime started" not in (tmp_path / "head.log").read_text():
            assert head.poll() is None
            time.sleep(0.2)
        yield home, f"127.0.0.1:{port}", clean
    finally:
        children = below(head.pid)
        head.terminate()
        head.wait()
        assert gone(children)


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_gets_it_or_the_user_is_told(tmp_path, guarded):
    home, address, clean = guarded
    script = "from bench.run.cluster import connected\nwith connected(sys.argv[1], None) as ray: print(ray.nodes())"

    def said(**more):
        asked = [sys.executable, "-c", f"import sys\n{script}", address]
        done = subprocess.run(asked, env={**clean, "HOME": str(tmp_path), **more}, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "NodeID" in said(HOME=str(home))
    assert "NodeID" in said(RAY_AUTH_TOKEN="0123456789abcdef" * 4)
    refused = f"the Ray cluster at {address} asks for its token, and "
    for told, more in {
        "there is none here; put what `ray get-auth-token` prints": {},
        "that of RAY_AUTH_TOKEN is another; put what": {"RAY_AUTH_TOKEN": "another"},
        "RAY_AUTH_MODE=disabled sends none; set it to token": {"HOME": str(home), "RAY_AUTH_MODE": "disabled"},
    }.items():
        assert refused + told in said(**more)


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_whoever_began_them(tmp_path, number):
    process = begun(tmp_path, "hang", "--executor", "ray")
    pids = hanging(tmp_path)
    children = below(process.pid)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    assert "the same command resumes" in said
    assert gone([*pids, *children])
