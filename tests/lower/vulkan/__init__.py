"""ExecuTorch's partitioner warns while it is imported, and here warnings are errors: it is imported first, in quiet."""

from afq_export.runtime.library import load_runtime, quiet

load_runtime()
with quiet():
    import executorch.backends.vulkan.partitioner.vulkan_partitioner  # noqa: F401
