#!/usr/bin/env bash
# Every part of gpu.py on the GPU that is here, in some 8 minutes, results in the folder $1.
#
#     bash benchmarks/gpu_all.sh FOLDER [PART...]
set -u
out=$1; shift
parts=${*:-check time tune profile whole}
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
small="import sys; sys.path[:0]=['benchmarks', 'tests']; import gpu_check as g, kernel_cases as k
names = ('window 1, a quarter', 'window 2', 'one by one', 'padded cells')
print([g.check(*k.CASES[n], steps=2)['passed'] for n in names])"

sanitize() {
  XLA_PYTHON_CLIENT_ALLOCATOR=platform timeout 140 compute-sanitizer --tool "$1" \
    --kernel-regex kns=microadam python3 -c "$small" >"$out/$1.txt" 2>&1
  echo "$1: rc $?: $(grep -a SUMMARY "$out/$1.txt" | tail -n 1)"
}

for part in $parts; do
  began=$SECONDS
  case $part in
    check)
      sanitize memcheck & sanitize racecheck &
      timeout 175 python3 benchmarks/gpu.py check --threads 13 --output "$out"
      wait ;;
    time) timeout 170 python3 benchmarks/gpu.py time --minutes 2.5 --output "$out" ;;
    tune) timeout 75 python3 benchmarks/gpu.py tune --output "$out" ;;
    profile)
      for kernel in "256 (2, 6 %)" "256 (1, 25 %)" "256 (10, 1 %)"; do
        echo "-- $kernel"
        XLA_PYTHON_CLIENT_PREALLOCATE=false timeout 60 ncu --clock-control none \
          --set full -k regex:microadam -c 1 --kill yes \
          python3 benchmarks/gpu.py launches --only "$kernel" >>"$out/profile.txt" 2>&1
      done
      grep -aE "microadam|Duration|Pipe|Throughput|Registers Per|Achieved Occ|Issue Slots|stall|Executed Ipc" \
        "$out/profile.txt" | cut -c1-170 | head -90 ;;
    whole) timeout 110 python3 benchmarks/gpu.py whole --minutes 1.5 --output "$out" ;;
  esac
  echo "== $part: rc $?, $((SECONDS - began)) s"
done
