"""The files on disk: weights in and out, outputs that appear whole or not at all, bundles opened and checked.

| module | subject |
|---|---|
| `safetensors_reader` | headers of safetensors files, checked; no tensor is read |
| `safetensors_plan`, `safetensors_writer` | what a new safetensors file holds; the one writer of such files |
| `cast`, `cast_ranges`, `file_ranges` | dtypes of arrays; dtypes of ranges of files, in threads; copies in the kernel |
| `weights_file`, `pickles`, `pickle_zip` | weights files of any kind; checkpoints of torch.save |
| `atomic_file`, `atomic_output`, `atomic_moves` | no half-written files: one file; any output; a journal of moves |
| `output_rules`, `replaceable_folders` | where an output may lie; which folders it may replace |
| `bundle`, `file_hashes`, `hub_cache_links` | opening and checking bundles; SHA-256, fingerprints; Hub cache links |
| `machine` | the machine that a measurement depends on |
"""
