"""Token ids and greedy answers of mlx-lm: FOLDER JOB"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

job = json.loads(Path(sys.argv[2]).read_text())
model, tokenizer = load(sys.argv[1])
answers = []
for prompt in job["prompts"]:
    answer = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=job["max_new_tokens"]):
        if int(token) in job["ends"]:
            break
        answer.append(int(token))
    answers.append(answer)
tokens = [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
print(json.dumps({"tokens": tokens, "answers": answers}))
