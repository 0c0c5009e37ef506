#!/usr/bin/env bash
# Everything a machine with a GPU can tell, in under 8 minutes: tests, exactness, kernels, models.
#
#     OUT=folder bash bench/device.sh            on a GPU
#     OUT=folder bash bench/device.sh --smoke    tiny shapes, on a CPU: does the script run to its end?
#
# Results lie under $OUT (default: bench/results): <device>/*.jsonl and device/*.log. A step that
# fails or runs out of its time does not keep the next from running; the exit status is the number
# of steps that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/results}
mkdir -p "$out/device"
export ERQ_RESULTS=$out PYTHONPATH=$PWD
python=${PYTHON:-python3}
failed=0

smoke=
[ "${1:-}" = --smoke ] && smoke=--smoke
if [ -n "$smoke" ]; then
	export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi

step() { # name, seconds, command
	local name=$1 limit=$2 start=$SECONDS status
	shift 2
	timeout --kill-after=10 "$limit" "$@" >"$out/device/$name.log" 2>&1
	status=$?
	[ $status -ne 0 ] && failed=$((failed + 1))
	printf '%-12s exit %d, %d s\n' "$name" $status $((SECONDS - start))
	tail -n 4 "$out/device/$name.log" | sed 's/^/    /'
}

step versions 60 "$python" -c '
import sys, torch, triton, timm
print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "timm", timm.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
[ -z "$smoke" ] && step clocks 20 nvidia-smi -q -d CLOCK,POWER,PERFORMANCE

if [ -n "$smoke" ]; then
	step tests 120 "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_pack.py
	step exactness 120 "$python" bench/exactness.py --smoke --out "$out/device/exactness.jsonl"
	step kernels 120 "$python" bench/kernels.py --smoke --seconds 0.1
	step models 240 "$python" bench/models.py --smoke --models deit_tiny_patch16_224 --batches 1 \
		--engines torch --backends triton --seconds 0.1
	step tune 240 "$python" bench/tune.py --smoke --out "$out/device"
	step build 240 "$python" csrc/build.py erq_cuda_emulated --out "$out/device"
	ERQ_CUDA_LIBRARY=$out/device/liberq_cuda_emulated.so \
		step cuda 240 "$python" bench/exactness.py --smoke --backend cuda
else
	# The most telling first, should the machine be taken away.
	export ERQ_TEST_REQUIRE=triton
	step build 75 "$python" csrc/build.py erq_cuda
	step exactness 120 "$python" bench/exactness.py --seconds 80 --out "$out/device/exactness.jsonl"
	step tests 85 "$python" -m pytest -q -p no:cacheprovider --maxfail=40 tests/kernels tests/test_graphs.py
	if command -v compute-sanitizer >/dev/null; then
		step sanitizer 40 compute-sanitizer --tool memcheck --error-exitcode 9 \
			"$python" bench/exactness.py --smoke --seconds 20 --backend cuda
	fi
	step kernels 55 "$python" bench/kernels.py --batches 1,8,64,256 --seconds 0.1
	step models 105 "$python" bench/models.py --models deit_small_patch16_224,vit_base_patch16_224 \
		--batches 1,8,64,256 --engines compile-bf16,torch-bf16 --backends triton --seconds 1
fi
echo "$failed steps failed; results in $out"
exit $failed
