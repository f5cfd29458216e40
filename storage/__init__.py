"""Files on disk: weights are read and written, outputs appear whole or not at all, bundles are opened and checked.

| module | subject |
|---|---|
| `open_file` | opens any file to read; every fault becomes a CheckpointError |
| `safetensors_reader` | reads and checks headers of safetensors files, without the tensors |
| `safetensors_plan`, `safetensors_writer` | the content of a new safetensors file; the one writer of such files |
| `cast`, `cast_ranges`, `file_ranges` | casts of arrays; casts of ranges of files, in threads; copies in the kernel |
| `weights_file`, `pickles`, `pickle_zip` | weights files of any kind; checkpoints of torch.save |
| `gguf_file`, `gguf_blocks` | headers of GGUF files; their blocks of integers with scales |
| `codes`, `scaled_codes`, `read_scale` | codes of few bits unpacked; values made into codes and factors; factors read |
| `float_rows`, `renamed_tensors` | rows of any matrix as float32; tensors under their diffusers names |
| `atomic_file`, `atomic_output`, `atomic_moves` | no half-written files: one file; any output; a journal of moves |
| `locks` | locks of files and folders between processes |
| `output_rules`, `replaceable_folders` | the places that an output may take; the folders that it may replace |
| `threads` | runs tasks in a few threads, in order |
| `bundle`, `bundle_lock` | bundles opened, checked, updated; recognised and locked |
| `file_hashes`, `content_digest`, `hub_cache_links` | hashes; digests of passports; links of the Hub's cache |
| `bucket`, `user_cache`, `file_sizes`, `install_hint` | buckets; the user's cache; sizes; words on how to install |
"""
