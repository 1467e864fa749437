"""The harness of the tests with several processes."""

import time

from tests import processes


def test_processes_add_over_all_devices_and_end_when_one_dies(tmp_path):
    source = """
        import time
        import jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "d")
        sharding = jax.sharding.NamedSharding(mesh, P("d"))
        data = np.arange(4.0, dtype=np.float32)
        x = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
        total = jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, P()))(x)
        print("sum", float(total), "of", PROCESSES, jax.local_device_count(), flush=True)
        (FOLDER / f"ready-{PROCESS}").touch()
        if (FOLDER / "wait").exists():
            time.sleep(300)
    """
    with processes.start(source, 2, tmp_path) as group:
        for output in group.wait():
            assert "sum 6.0 of 2 2" in output
    for k in range(2):
        (tmp_path / f"ready-{k}").unlink()
    (tmp_path / "wait").touch()
    with processes.start(source, 2, tmp_path) as group:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready-{k}").exists() for k in range(2)):
            assert time.monotonic() < deadline, group.output(0) + group.output(1)
            time.sleep(0.1)
        group.kill(1)
        assert all(group.codes(timeout=60))
