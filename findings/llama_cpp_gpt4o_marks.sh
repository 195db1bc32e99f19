#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549), tokenizers 0.23.3: the pre-tokenizer `gpt-4o`, which GPT-OSS has, splits words at combining marks.
# The pattern of these tokenizers counts marks (\p{M}) among the characters of a word. llama.cpp's own form of it, which its regular
# expressions can do, has letters alone. So a word of a script with vowel signs is cut into pieces before byte pairs are merged, and the
# tokens are others than those that the model was trained on; decoded they give the same text, so nothing shows. Latin text is cut alike.
# Seen for a BPE tokenizer with that pattern: Hindi and Thai words that are one token become several, English stays.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install -q numpy==2.4.6 tokenizers==0.23.3 gguf==0.19.0 xllamacpp==2026.10.11549
export HF_HUB_OFFLINE=1
"$python" - "$folder" 2> "$folder/said" << 'EOF' || { tail -5 "$folder/said" >&2; exit 1; }
import json
import sys
import urllib.request

import gguf
import numpy
import xllamacpp
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

UPPER, LOWER, END = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
PATTERN = (
    rf"{BEFORE}{UPPER}*{LOWER}+{END}|{BEFORE}{UPPER}+{LOWER}*{END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = {"English": "The quick brown fox isn't here.", "Hindi": "नमस्ते दुनिया", "Thai": "สวัสดี น้ำ"}


def check(holds, what):
    if not holds:
        sys.exit(f"the behaviour changed: {what}")


def ask(base, path, body):
    asked = urllib.request.Request(f"{base}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(asked, timeout=60))


def write(file, tokenizer, pre, seed=0):
    """A random Llama of one layer with this BPE tokenizer."""
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    random = numpy.random.default_rng(seed)
    hidden, heads, width = 64, 2, 96
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 256),
        (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, width),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, pre),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3] + [1] * (len(tokens) - 1)),
        (writer.add_token_merges, [" ".join(pair) for pair in content["merges"]]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 0),
        (writer.add_add_bos_token, False),
    ):
        add(value)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden), "blk.0.ffn_down": (hidden, width)}
    shapes |= {f"blk.0.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (width, hidden) for name in ("ffn_gate", "ffn_up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(numpy.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


tokenizer = Tokenizer(models.BPE(ignore_merges=True))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(list(TEXTS.values()) * 50, trainer)
file = f"{sys.argv[1]}/model.gguf"
write(file, tokenizer, "gpt-4o")
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.port = file, 256, False, 0
server = xllamacpp.Server(params)
for language, text in TEXTS.items():
    meant = tokenizer.encode(text).ids
    found = ask(server.listening_address, "tokenize", {"content": text, "add_special": False})["tokens"]
    print(f"{language}: {len(meant)} tokens by tokenizers, {len(found)} by llama.cpp, {'equal' if meant == found else 'different'}")
    check((meant == found) == (language == "English"), f"{language} is expected to be {'equal' if language == 'English' else 'different'}")
    check(tokenizer.decode(found) == text, "llama.cpp's tokens are another text")
print("as described")
EOF
