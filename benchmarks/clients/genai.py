"""Token ids and greedy answers of onnxruntime-genai: FOLDER JOB"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

job = json.loads(Path(sys.argv[2]).read_text())
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
answers = []
for prompt in job["prompts"]:
    parameters = og.GeneratorParams(model)
    length = len(prompt) + job["max_new_tokens"]
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answers.append(generator.get_sequence(0)[len(prompt) :].tolist())
tokens = [tokenizer.encode(text).tolist() for text in job["texts"]]
print(json.dumps({"tokens": tokens, "answers": answers}))
