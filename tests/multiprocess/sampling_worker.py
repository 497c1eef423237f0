"""One process of a job that samples and is examined: `sampling_worker.py COORDINATOR COUNT INDEX DEVICES OUTPUT`."""

import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from examinee_cases import continued, examinee, prompts
from sampling_cases import OPTIONS, PROMPTS, SPEC, parameters, placed

from ministral_jax.distributed.processes import Limits, join, leave, use_cpu
from ministral_jax.evaluation.examinee import Manner
from ministral_jax.models.vlm import VLM
from ministral_jax.sampling.engine import generate

coordinator, count, index, devices, output = sys.argv[1:]
use_cpu(int(devices))
join(Limits(), coordinator=coordinator if int(count) > 1 else None, count=int(count), index=int(index))
found = {}
for name, mesh in {"data": dict(data=2, fsdp=1, tensor=2), "fsdp": dict(fsdp=2, tensor=2)}.items():
    place = placed(mesh, jax.device_count())
    options = OPTIONS.model_copy(update={"completions_per_prompt": 2})
    completions = generate(VLM(SPEC), parameters(place), PROMPTS, options, place)
    found[name] = [c._asdict() for c in completions]
one = examinee(Path(output).with_suffix(""), placed(dict(data=2, fsdp=1, tensor=2), jax.device_count()), batch=4)
examined = one.likelihoods(continued(one.tokenizer)), one.say(prompts(one.tokenizer), Manner(max_tokens=9))
Path(output).write_text(json.dumps({"sampled": found, "examined": examined}))
sys.exit(leave(0, together=True))
