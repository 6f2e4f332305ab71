// A kernel that is gone does not say so: what has had no answer for this long gets a hint.
const PATIENCE_MS = 6_000, SILENT = 'No answer yet: the kernel is busy or gone. If the kernel is gone, run the cell again.';
