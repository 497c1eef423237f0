"""Where the time of traced steps went: from operations to rows, and from traces as TPUs and GPUs write them."""

import jax
import pytest

from ministral_jax.training.profiling import Op, read_trace, time_by_scope

LAYER = "jit(step)/{}/decoder/while/body/closed_call/{}layers/attention/"
FORWARD = LAYER.format("jvp(VLM.hidden)", "")
BACKWARD = LAYER.format("transpose(jvp(VLM.hidden))", "checkpoint/")


def test_each_operation_counts_to_the_innermost_scope_and_to_its_part_of_the_step():
    ops = [
        Op("fusion.1", FORWARD + "attention/attend/dot_general", 0, 4e6),
        Op("fusion.2", FORWARD + "attention/dot_general", 4e6, 5e6),
        Op("fusion.3", BACKWARD + "attention/attend/dot_general", 5e6, 13e6),
        Op("fusion.4", BACKWARD.replace("checkpoint", "checkpoint/rematted_computation") + "mul", 13e6, 14e6),
        Op("fusion.5", "jit(step)/teacher/VLM.hidden/decoder/layers/mlp/mlp/dot_general", 14e6, 16e6),
        Op("fusion.6", "jit(step)/teacher/VLM.hidden/vision/layers/attention/attend/exp", 16e6, 17e6),
        Op("fusion.7", "jit(step)/optimizer/mul", 17e6, 18e6),
        Op("all-gather-start.2", FORWARD + "all_gather", 17e6, 19e6),
        Op("copy.1", "", 39e6, 40e6),
    ]
    table = time_by_scope([ops], steps=2)
    found = {(row.scope, row.part): row.milliseconds for row in table.rows}
    assert found == {
        ("attend", "backward"): 4,
        ("attend", "forward"): 2,
        ("mlp", "teacher"): 1,
        ("collectives", "forward"): 1,
        ("attention", "forward"): 0.5,
        ("attention", "recomputed"): 0.5,
        ("vision", "teacher"): 0.5,
        ("optimizer", ""): 0.5,
        ("rest", ""): 0.5,
    }
    assert [row.milliseconds for row in table.rows] == sorted(found.values(), reverse=True)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert (table.milliseconds, table.busy) == (20, 0.5)  # 17 to 18 was busy twice
    assert table.lines()[:2] == [
        "2 steps of 20.0 ms, devices busy 50% of it",
        "attend backward            4.00 ms  38.1%",
    ]


def test_a_tpu_says_the_path_beside_the_name_of_an_event():
    # One device of two ran a loop of 8 us around 5 us of attention; the line of modules says all of it again.
    plane = """
    planes { id: %d name: "%s"
      lines { id: 1 name: "XLA Modules" events { metadata_id: 2 duration_ps: 9000000 } }
      lines { id: 2 name: "XLA Ops"
        events { metadata_id: 2 offset_ps: 0 duration_ps: 8000000 }
        events { metadata_id: 1 offset_ps: 1000000 duration_ps: 5000000 }
        events { metadata_id: 3 offset_ps: 6000000 duration_ps: 1000000 } }
      event_metadata { key: 1 value { id: 1 name: "%%fusion.3 = bf16[8]{0} fusion(bf16[8]{0} %%p)"
        stats { metadata_id: 1 str_value: "jit(step)/jvp(VLM.hidden)/layers/attention/attend/dot_general" } } }
      event_metadata { key: 2 value { id: 2 name: "%%while.1 = (s32[]) while((s32[]) %%t)" } }
      event_metadata { key: 3 value { id: 3 name: "%%all-reduce.7 = f32[8]{0} all-reduce(f32[8]{0} %%x)"
        stats { metadata_id: 1 ref_value: 9 } } }
      stat_metadata { key: 1 value { id: 1 name: "tf_op" } }
      stat_metadata { key: 9 value { id: 9 name: "jit(step)/transpose(jvp(VLM.hidden))/psum" } } }"""
    text = plane % (1, "/device:TPU:0") + plane % (2, "/device:TPU:1") + plane % (3, "/device:CUSTOM:other")
    devices = read_trace(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    assert [[(op.name, op.end - op.start) for op in ops] for ops in devices] == 2 * [
        [("fusion.3", 5000), ("all-reduce.7", 1000)]
    ]
    rows = time_by_scope(devices, 1).rows
    assert [(row.scope, row.part) for row in rows] == [("attend", "forward"), ("collectives", "backward")]
    assert rows[0].milliseconds == pytest.approx(5e-3)  # the mean over devices


def test_a_gpu_names_the_instruction_and_the_hlo_proto_its_path():
    path = "jit(step)/transpose(jvp(loss_head))/dot_general"
    instruction = field(1, b"gemm_fusion") + field(7, field(2, path.encode()))
    module = field(1, b"jit_step") + field(3, field(2, instruction))
    proto = "".join(f"\\{byte:03o}" for byte in field(1, module))
    text = f"""
    planes {{ name: "/device:GPU:0"
      lines {{ id: 1 name: "Stream #13(Compute)"
        events {{ metadata_id: 1 duration_ps: 3000000
          stats {{ metadata_id: 1 str_value: "gemm_fusion" }} stats {{ metadata_id: 2 str_value: "jit_step" }} }}
        events {{ metadata_id: 2 offset_ps: 3000000 duration_ps: 1000000 }} }}
      lines {{ id: 2 name: "XLA Launch" events {{ metadata_id: 1 duration_ps: 7000000 }} }}
      event_metadata {{ key: 1 value {{ id: 1 name: "nvjet_tst_128x256" }} }}
      event_metadata {{ key: 2 value {{ id: 2 name: "ncclDevKernel_AllGather" }} }}
      stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
      stat_metadata {{ key: 2 value {{ id: 2 name: "hlo_module" }} }} }}
    planes {{ name: "/host:metadata"
      event_metadata {{ key: 1 value {{ id: 1 name: "jit_step(1)"
        stats {{ metadata_id: 1 bytes_value: "{proto}" }} }} }}
      stat_metadata {{ key: 1 value {{ id: 1 name: "Hlo Proto" }} }} }}"""
    (ops,) = read_trace(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    assert [(op.name, op.path) for op in ops] == [("gemm_fusion", path), ("ncclDevKernel_AllGather", "")]
    scopes = [(row.scope, row.part) for row in time_by_scope([ops], 1).rows]
    assert scopes == [("loss head", "backward"), ("collectives", "")]


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field in protobuf's wire format."""
    size, lengths = len(payload), []
    while size > 127:
        lengths.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *lengths, size]) + payload
