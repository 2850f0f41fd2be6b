"""transformers: a BERT with accelerated norms gives the same outputs, is saved, and loaded by transformers alone."""

import copy
import tempfile

import torch
import vision  # noqa: F401
from transformers import BertConfig, BertModel

import anynorm

torch.manual_seed(0)
config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100)
model = BertModel(config).eval()
twin = copy.deepcopy(model)
report = anynorm.accelerate(model)
ids = torch.randint(100, (2, 9))
expected = twin(ids).last_hidden_state
torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = BertModel.from_pretrained(folder).eval()
assert type(loaded.embeddings.LayerNorm) is torch.nn.LayerNorm
torch.testing.assert_close(loaded(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
print(f"with a catch: {len(report.changed)} norms changed; `from_pretrained` gives torch's norms: accelerate after it")
