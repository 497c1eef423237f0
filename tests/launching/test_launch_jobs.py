"""Rendered jobs: what they ask for, valid by JobSet's own schema, free of secrets; bad input is one sentence."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_cases import GKE, GKE_GPU, GKE_TPU, NASTY, RECIPE, SCRIPTS, SLURM_GPU, TPU_VM, render
from paths import TESTS

from ministral_jax.cli import main
from ministral_jax.launching import templates
from ministral_jax.recipe.launch import ON_GPUS
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.runs.identity import identity

ALWAYS = {"job-name": "tiny", "output": "%x-%j.log", "open-mode": "append", "requeue": "", "signal": "TERM@120"}
ALONE = {"nodes": "1", "ntasks-per-node": "1"}
GPU = {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "24:00:00", "partition": "gpu"}
MORE = {"signal": "TERM@300", "cpus-per-task": "12", "mem": "900G", "account": "lm", "chdir": "/scratch/lm"}


@pytest.mark.parametrize(
    ("arguments", "directives", "words"),
    [
        (["slurm"], ALONE, []),
        (["slurm", "parent", "launch.slurm.nodes=4"], ALONE | {"nodes": "4"}, ["parent", "--distributed"]),
        (["slurm", "launch.slurm.tasks_per_node=3"], ALONE | {"ntasks-per-node": "3"}, ["--distributed"]),
        (SLURM_GPU, GPU | MORE, ["14b-short", "mesh.tensor=2", "--distributed"]),
    ],
)
def test_what_slurm_is_asked_for(arguments, directives, words):
    script = render(*arguments)
    head = script.partition("\n\n")[0]  # SLURM reads directives up to the first command
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", head, re.MULTILINE))
    assert script.startswith("#!/bin/bash\n") and found == ALWAYS | directives
    ((asked, command),) = re.findall(r"^srun (.*) bash .* task \\\n(.*)$", script, re.MULTILINE)
    cpus = [f"--cpus-per-task={directives['cpus-per-task']}"] if "cpus-per-task" in directives else []
    assert asked.split()[2:] == cpus  # or a task would be bound to one core
    assert shlex.split(command) == ["ministral-jax", "run", "configs/tiny.yaml", *words]


def closed(schema):
    """The same schema, refusing fields that it does not name, as a server refuses them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    named = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    return ({"additionalProperties": False} if named else {}) | {key: closed(part) for key, part in schema.items()}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(TESTS.joinpath("jobset_schema.json").read_text(encoding="utf-8"))
    job = schema["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
    pod_metadata = job["properties"]["spec"]["properties"]["template"]["properties"]["metadata"]
    schema["properties"]["metadata"] = pod_metadata  # a CRD leaves its own to the server, and it is the same
    return jsonschema.Draft202012Validator(closed(schema))


EVERY = """
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
spec:
  failurePolicy: {maxRestarts: 20}
  replicatedJobs: [{template: {spec: {completionMode: Indexed, backoffLimit: 0, template: {spec: {
    restartPolicy: Never,  # a podFailurePolicy is accepted with no other
    containers: [{workingDir: /work, volumeMounts: [{name: work, mountPath: /work}]}], volumes: [{name: work}]}}}}}]
"""
TPU = """
metadata: {name: tiny, labels: {kueue.x-k8s.io/queue-name: research}, annotations: {
  alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}}
spec: {replicatedJobs: [{replicas: 2, template: {spec: {parallelism: 4, completions: 4, template: {
  metadata: {annotations: {gke-gcsfuse/volumes: "true"}}, spec: {
  serviceAccountName: trainer, terminationGracePeriodSeconds: 120, nodeSelector: {cloud.google.com/gke-spot: "true",
  cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 4x4},
  volumes: [{csi: {volumeAttributes: {bucketName: my-runs}}}], containers: [{
  image: "registry.example/ministral-jax:0.1", resources: {requests: {google.com/tpu: 4}, limits: {google.com/tpu: 4}},
  env: [{}, {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hub, key: token}}}]}]}}}}}]}
"""
HOST = "{spec: {replicatedJobs: [{replicas: 1, template: {spec: {parallelism: 1, completions: 1}}}]}}"
NODES = """
metadata: {name: big-run}
spec: {network: {enableDNSHostnames: true, subdomain: big-run, publishNotReadyAddresses: true}, replicatedJobs: [{
  name: worker, replicas: 1, template: {spec: {parallelism: 2, completions: 2, template: {spec: {
  terminationGracePeriodSeconds: 60, nodeSelector: {cloud.google.com/gke-accelerator: nvidia-h100-80gb},
  volumes: [{persistentVolumeClaim: {claimName: runs}}], containers: [{ports: [{containerPort: 8476}],
  resources: {requests: {nvidia.com/gpu: 8}, limits: {nvidia.com/gpu: 8}}}]}}}}}]}
"""


def has(node, wanted) -> bool:
    """Whether a document has everything that another one has."""
    if isinstance(node, dict) and isinstance(wanted, dict):
        return all(key in node and has(node[key], value) for key, value in wanted.items())
    if isinstance(node, list) and isinstance(wanted, list):
        return len(node) >= len(wanted) and all(map(has, node, wanted))
    return node == wanted


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (GKE_TPU, TPU),
        (("gke", *GKE, "launch.gke.tpu={type: v6e, topology: 2x4}", "mesh.tensor=2"), HOST),
        (GKE_GPU, NODES),
    ],
)
def test_what_kubernetes_is_asked_for_is_a_valid_jobset(validator, arguments, wanted):
    manifest = yaml.safe_load(render(*arguments))
    assert [error.message for error in validator.iter_errors(manifest)] == []
    assert has(manifest, yaml.safe_load(EVERY)) and has(manifest, yaml.safe_load(wanted)), manifest


def parts(text: str):
    """A manifest, the spec of its only job, the spec of that job's pods and their only container."""
    manifest = yaml.safe_load(text)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return manifest, replicated["template"]["spec"], pod, container


def test_the_schema_catches_slips(validator):
    manifest, _, pod, container = parts(render(*GKE_TPU))
    pod["nodeSelectors"] = manifest["metadata"]["annotation"] = container["resources"]["limit"] = {}
    manifest["spec"]["failurePolicy"]["maxRestarts"] = "3"
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    found = " ".join(error.message for error in validator.iter_errors(manifest))
    assert "'3' is not of type 'integer'" in found and "'Restart' is not one of" in found
    assert all(f"'{name}' was unexpected" in found for name in ("nodeSelectors", "annotation", "limit"))


def test_failures_are_told_apart_by_messages_that_kubernetes_writes():
    """The job controller's own words (`pkg/controller/job/pod_failure_policy.go`), against the rules in order."""
    manifest, job, _, _ = parts(render(*GKE_TPU))

    def action(message: str) -> str:
        for rule in manifest["spec"]["failurePolicy"]["rules"]:
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return "RestartJobSet"

    taken = "Pod lm/tiny-worker-0-0-x has condition DisruptionTarget matching FailJob rule at index 0"
    fault = "Container worker for pod lm/tiny-worker-0-0-x failed with exit code 2 matching FailJob rule at index 1"
    assert action(taken) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(fault) == "FailJobSet"
    assert action("Job has reached the specified backoff limit") == "RestartJobSet"
    codes = {"containerName": "worker", "operator": "NotIn", "values": [75, 134, 135, 137, 139, 143]}
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"] == codes


@pytest.mark.parametrize(
    ("kind", "topology", "count", "chips"),
    [
        *[("v5e", "1x1", 1, 1), ("v5e", "2x2", 1, 4), ("v5e", "2x4", 1, 8), ("v5e", "16x16", 64, 4)],
        *[("v6e", "4x8", 8, 4), ("v5p", "2x2x1", 1, 4), ("v5p", "2x2x2", 2, 4), ("v5p", "4x4x8", 32, 4)],
    ],
)
def test_hosts_of_a_slice(kind, topology, count, chips):
    tpu = f"launch.gke.tpu={{type: {kind}, topology: {topology}}}"
    _, job, _, container = parts(render("gke", *GKE, tpu, "mesh={fsdp: 1, tensor: -1}"))
    assert job["completions"] == count and container["resources"]["limits"] == {"google.com/tpu": chips}
    assert ("--distributed" in container["command"]) == (count > 1)


def expand(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a container's words: `$(NAME)` where NAME is known, `$$` to `$`."""
    known = lambda match: variables.get(match[1], match[0]) if match[1] else "$"
    return re.sub(r"\$\$|\$\(([^)]*)\)", known, text)


@pytest.mark.parametrize(
    ("arguments", "mesh", "more"),
    [
        (GKE_TPU, "mesh={slice: 2, tensor: 8}", ["--distributed"]),
        (
            GKE_GPU,
            "mesh.tensor=4",
            ["--coordinator", "big-run-worker-0-0.big-run:8476", "--process-count", "2", "--process-index", "1"],
        ),
    ],
)
def test_words_reach_the_container_verbatim(arguments, mesh, more):
    *_, container = parts(render(*arguments, NASTY))
    words = [expand(word, {"HOME": "/root", "JOB_COMPLETION_INDEX": "1"}) for word in container["command"]]
    assert words == ["ministral-jax", "run", "configs/tiny.yaml", mesh, NASTY, *more]
    said = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    if "LIBTPU_INIT_ARGS" in said:
        assert expand(said["LIBTPU_INIT_ARGS"], {"Y": "no"}) == "--x=$(Y) --z=$5"
    else:
        assert said == ON_GPUS


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_yaml_string(text):
    assert yaml.safe_load(f"a: [{templates.yaml(text)}, 1]") == {"a": [text, 1]}
    assert yaml.safe_load(templates.yaml([text, text])) == [text, text]


def shellcheck(script: str, shell: str = "bash") -> None:
    program = Path(sysconfig.get_path("scripts"), "shellcheck")
    checked = subprocess.run([program, f"--shell={shell}", "-"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("arguments", SCRIPTS)
def test_scripts_are_clean(arguments):
    script = render(*arguments)
    shellcheck(script)
    if worker := re.search(r"^worker=.*?^poll=", script, re.DOTALL | re.MULTILINE):  # what is sent to the hosts
        sent = ["bash", "-c", worker[0] + '; printf %s "$worker"']
        shellcheck(subprocess.run(sent, capture_output=True, check=True, text=True).stdout)


def test_settings_of_the_launch_stay_out_of_the_command_and_of_a_stage():
    text = render("slurm", "parent", "launch.slurm.nodes=4", "stages.parent.steps=7")
    assert "launch." not in text and "parent stages.parent.steps=7 --distributed" in text
    plain, other = load_recipe(RECIPE), load_recipe(RECIPE, ["launch.slurm.nodes=4"])
    assert plain != other
    spec = resolve_specs(plain)["parent"]
    assert identity(plain.stages["parent"], spec) == identity(other.stages["parent"], spec)


def test_a_recipe_may_hold_the_block_and_a_template_in_it_stays_text(tmp_path):
    recipe = tmp_path / "mine.yaml"
    text = Path(RECIPE).read_text(encoding="utf-8")
    recipe.write_text(text + "launch: {slurm: {nodes: 3, environment: {A: '{{ job }} {% for x in y %}'}}}\n")
    script = render("slurm", recipe=str(recipe))
    assert "--nodes=3" in script and "export A='{{ job }} {% for x in y %}'" in script
    assert "--nodes=5" in render("slurm", "launch.slurm.nodes=5", recipe=str(recipe))
    no_secret = "launch.slurm.environment={TOKENIZERS_PARALLELISM: 'false'}"  # though it holds TOKEN
    assert "export TOKENIZERS_PARALLELISM=false\n" in render("slurm", no_secret)


BAD = [
    (["slurm", "launch.slurm.nodess=2"], "unknown key launch.slurm.nodess (did you mean nodes?)"),
    (["slurm", "launch.slurrm.nodes=2"], "unknown key launch.slurrm (did you mean slurm?)"),
    (["slurm", "launch.slurm.partition='a b'"], "launch.slurm.partition: string should match pattern"),
    (["slurm", "launch.slurm.options.mem='1 G'"], "launch.slurm.options.mem: string should match pattern"),
    (["slurm", "launch.slurm={gpus_per_node: 8, tasks_per_node: 2}"], "tasks_per_node = 2 must equal gpus_per_node"),
    (["slurm", "launch.slurm.time=soon"], "launch.slurm.time: string should match pattern"),
    (["slurm", "parentt"], "no stage 'parentt' in recipe 'tiny' (did you mean parent?)"),
    (["gke"], "has no launch.gke, which launch gke needs"),
    (["gke", "launch.gke.volume.claim=a"], "launch.gke.image is required"),
    (["gke", *GKE], "exactly one of tpu and gpu must be given"),
    (["gke", *GKE, "launch.gke.volume.claim=a"], "exactly one of claim and bucket must be given"),
    (["gke", *GKE, "launch.gke.tpu={type: v7, topology: 4x4}"], "input should be 'v5e', 'v5p' or 'v6e', got 'v7'"),
    (["gke", *GKE, "launch.gke.tpu={type: v5e, topology: 3x3}"], "v5e has no topology '3x3' (accepted: 1x1"),
    (["gke", *GKE, "launch.gke.tpu={type: v5p, topology: 4x4}"], "v5p has no topology '4x4' (accepted: 2x2x1"),
    (["gke", *GKE, "launch.gke.tpu={type: v5e, topology: 4x4, slices: 0}"], "tpu.slices: input should be greater"),
    (["gke", *GKE, "launch.gke.tpu={type: v6e, topology: 4x4, hosts: 2}"], "tpu.hosts = 2, but a slice of v6e"),
    ([*GKE_GPU, "launch.gke.name=8b"], "a JobSet cannot be called '8b'"),
    (["tpu-vm", *TPU_VM, "launch.tpu_vm.accelerator_type=h100"], "tpu_vm.accelerator_type: string should match"),
    (
        ["tpu-vm", *TPU_VM, "launch.tpu_vm.reserved=true", "launch.tpu_vm.spot=true"],
        "reserved and spot exclude each other",
    ),
    (["tpu-vm", *TPU_VM, "launch.tpu_vm.bucket=gs://b"], "launch.tpu_vm.bucket: gs://b is a URL, and must be"),
    (["gke", *GKE, "launch.gke.volume={bucket: gs://b}"], "launch.gke.volume.bucket: gs://b is a URL, and must be"),
    (["local", "--submit"], "launch local runs at once"),
    (["slurm", "--output", "/nowhere/job"], "--output /nowhere/job: No such file or directory"),
    # a secret in any scheduler's block, whichever is launched, is refused and not repeated
    (["slurm", "launch.slurm.environment.HF_TOKEN=hush"], "HF_TOKEN looks like a secret"),
    (["slurm", "launch.slurm.environment.WANDB_API_KEY=hush"], "launch.slurm.env_file"),
    (["slurm", "launch.gke.environment.hf_token=hush"], "launch.gke.secrets.NAME={secret: .., key: ..}"),
    (["slurm", "launch.tpu_vm.environment.DB_PASSWORD=hush"], "launch.tpu_vm.setup"),
    (["slurm", "launch.local.environment.AWS_SECRET=hush"], "your shell's environment"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence(capsys, arguments, message):
    scheduler, *rest = arguments
    assert main(["launch", scheduler, RECIPE, *rest]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "hush" not in captured.err
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("ministral-jax: ") and message in line


def test_output_and_submit(tmp_path, monkeypatch, capfd):
    assert main(["launch", "tpu-vm", RECIPE, *TPU_VM, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "tiny.sh").stat().st_mode & 0o111
    for client in ("sbatch", "kubectl"):
        (tmp_path / client).write_text(f'#!/bin/bash\ncat > {tmp_path}/{client}.stdin; echo "$@"; exit 3\n')
        (tmp_path / client).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    capfd.readouterr()
    assert main(["launch", "slurm", RECIPE, "--submit"]) == 3
    assert (tmp_path / "sbatch.stdin").read_text() == render("slurm").replace("configs/tiny.yaml", RECIPE)
    assert main(["launch", "gke", RECIPE, *GKE_GPU[1:], "--submit", "--output", str(tmp_path / "job.yaml")]) == 3
    assert capfd.readouterr().out == "\ncreate -f -\n"
    assert (tmp_path / "kubectl.stdin").read_text() == (tmp_path / "job.yaml").read_text()
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", RECIPE, "--submit"]) == 2
    assert "--submit needs 'sbatch', which is not installed here" in capfd.readouterr().err
