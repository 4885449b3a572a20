#!/bin/sh
# Set up what pyvmm needs on this machine: system packages, .venv, the C extension; and the testbed
# where this machine's KVM runs no Linux. Quick where all is there; needs root (or sudo without a
# password) only for missing system packages.
#
#   tools/setup.sh [--tests] [--trees] [--fuzz] [--testbed | --no-testbed]
#
# --tests: also what only tests, lint and bench need, the testbed among it.
# --trees: also what makes trees of Debian, for make check-install and make soak-share.
# --fuzz: also what only make fuzz needs: clang, atheris, and the Python packages of the tests.
#
# PYVMM_PYTHON chooses the interpreter of .venv (default: Debian's /usr/bin/python3).
set -eu
cd "$(dirname "$0")/.."

PACKAGES="python3 python3-venv python3-dev gcc libc6-dev linux-libc-dev make busybox-static kmod
iproute2 iputils-ping iperf3 ca-certificates"
TESTBED_PACKAGES="qemu-system-x86"
FUZZ_PACKAGES="clang libclang-rt-dev llvm"
TEST_PACKAGES="ethtool acpica-tools cpio util-linux procps chromium openssh-client
zsh fish mandoc tshark"
TREE_PACKAGES="debootstrap"
testbed=auto tests=no fuzz=no trees=no
for option in "$@"; do
	case $option in
	--no-testbed) testbed=no ;;
	--testbed) testbed=yes ;;
	--tests) tests=yes ;;
	--trees) trees=yes ;;
	--fuzz) fuzz=yes testbed=no ;;
	*) printf 'setup: unknown option %s\n' "$option" >&2; exit 2 ;;
	esac
done
if [ $tests = yes ]; then
	PACKAGES="$PACKAGES $TEST_PACKAGES $TESTBED_PACKAGES"
	[ $testbed = no ] || testbed=yes
fi
[ $trees = no ] || PACKAGES="$PACKAGES $TREE_PACKAGES"
[ $fuzz = no ] || PACKAGES="$PACKAGES $FUZZ_PACKAGES"
STAMP=.venv/.pyvmm-setup
LOG=build/setup.log

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# step TITLE COMMAND...: run quietly, show the time that passes; on failure the end of what it said.
step() {
	title=$1; shift
	mkdir -p build
	say "$title"
	"$@" >"$LOG" 2>&1 &
	pid=$! seconds=0
	while kill -0 "$pid" 2>/dev/null; do
		sleep 1
		seconds=$((seconds + 1))
		if [ $((seconds % 5)) = 0 ]; then
			# Only ASCII: cut(1) would cut within a character.
			line=$(tail -n 1 "$LOG" | LC_ALL=C tr -cd '[:print:]' | cut -c 1-90)
			printf '   %s s%s\n' "$seconds" "${line:+: $line}" >&2
		fi
	done
	if ! wait "$pid"; then
		tail -n 20 "$LOG" >&2
		die "$title: failed; all that it said is in $LOG"
	fi
}

# --- system packages ------------------------------------------------------------------------------

# install PACKAGE...: those that are missing.
install() {
	command -v dpkg-query >/dev/null || {
		say "this is not Debian: make sure of the equivalents of: $(echo "$@")"
		return
	}
	missing=" $(echo "$@") "
	# One query for all; what it prints is there.
	for p in $(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null |
		sed -n 's/^installed //p'); do
		missing=$(printf '%s' "$missing" | sed "s/ $p / /")
	done
	missing=$(echo $missing)
	[ -n "$missing" ] || return 0
	command="apt-get install -y --no-install-recommends $missing"
	if [ "$(id -u)" = 0 ]; then root=
	elif sudo -n true 2>/dev/null; then root=sudo
	else die "system packages are missing; run as root: $command"; fi
	[ -n "${listed:-}" ] || step "fetching package lists" $root apt-get update
	listed=yes
	step "installing $missing" $root env DEBIAN_FRONTEND=noninteractive $command
}

install $PACKAGES
# Debian 12 has it in what QEMU needs, Debian 13 in a package of its own.
[ $tests = no ] || [ -x /usr/bin/qemu-storage-daemon ] || install qemu-utils

# --- .venv ----------------------------------------------------------------------------------------
python=${PYVMM_PYTHON:-}
if [ -z "$python" ]; then
	python=/usr/bin/python3
	"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || python=python3
fi
sum=$(cat tools/requirements/*.txt tools/setup.sh | cksum)
have=$(cat "$STAMP" 2>/dev/null || true)
extras=
case $have in "$sum for "*) extras=${have#"$sum for "} ;; esac # once they are there, they stay
[ $tests = no ] || [ "$extras" ] || extras=dev
[ $fuzz = no ] || extras="dev fuzz"
want="$sum for $extras"
if [ "$have" != "$want" ] || ! .venv/bin/python -c '' 2>/dev/null; then
	"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed, not $python"
	.venv/bin/python -c '' 2>/dev/null || step "making .venv" "$python" -m venv --clear .venv
	# The extension is built below, in place. The files are exactly those of tools/requirements.
	case $extras in *fuzz) list=fuzz ;; dev) list=dev ;; *) list=run ;; esac
	step "installing Python packages" .venv/bin/python -m pip install --disable-pip-version-check \
		--progress-bar off --require-hashes -r tools/requirements/$list.txt
	# An editable install's import hook, distutils' and the script that pip generates each cost more at
	# start-up than pyvmm itself; a path and three lines do the same.
	site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	pwd >"$site/pyvmm.pth"
	# What makes pytest find the plugin, as a real install would.
	mkdir -p "$site/pyvmm-0.dist-info"
	printf 'Metadata-Version: 2.1\nName: pyvmm\nVersion: 0\n' >"$site/pyvmm-0.dist-info/METADATA"
	printf '[pytest11]\npyvmm = pyvmm.testing.plugin\n' >"$site/pyvmm-0.dist-info/entry_points.txt"
	rm -f "$site/distutils-precedence.pth"
	interpreter="$PWD/.venv/bin/python"
	case $interpreter in
	*[[:space:]]*) printf "#!/bin/sh\n'''exec' '%s' \"\$0\" \"\$@\"\n' '''\n" "$interpreter" ;;
	*) printf '#!%s\n' "$interpreter" ;;
	esac >.venv/bin/pyvmm
	cat >>.venv/bin/pyvmm <<-P
		import sys
		from pyvmm.cli import main
		sys.exit(main())
	P
	chmod +x .venv/bin/pyvmm
	printf '%s\n' "$want" >"$STAMP"
fi

# --- the C extension ------------------------------------------------------------------------------
ext=$(echo pyvmm/_ext*.so)
if [ ! -e "$ext" ] || [ -n "$(find cext setup.py pyproject.toml -newer "$ext" -type f -print -quit)" ]; then
	step "building the C extension" .venv/bin/python setup.py -q build_ext --inplace
	touch pyvmm/_ext*.so
fi

# Bytecode at once: where PYTHONDONTWRITEBYTECODE is set, or for a user who may not write here, every run would compile.
.venv/bin/python -m compileall -q pyvmm

# --- for the tests, unpacked into the cache: DPDK's testpmd, a foreign vhost-user peer, 6 MB; a tree with systemd, 10 MB
if [ $tests = yes ] && command -v apt-get >/dev/null; then
	.venv/bin/python -m tests.dpdk
	.venv/bin/python -m tests.tree
fi

# --- the testbed ----------------------------------------------------------------------------------
if [ $testbed = auto ]; then
	reason=$(.venv/bin/python -c '
from pyvmm.doctor import can_run_linux_locally
good, reason = can_run_linux_locally()
print("" if good else reason)')
	testbed=no
	if [ -n "$reason" ]; then
		say "$reason: Linux guests will run in the testbed"
		testbed=yes
	fi
fi
if [ $testbed = yes ]; then
	install $TESTBED_PACKAGES
	# Debian 12 has virtiofsd beside QEMU, in C; Debian 13 as a package of its own, in Rust.
	if [ ! -x /usr/lib/qemu/virtiofsd ] && [ ! -x /usr/libexec/virtiofsd ]; then
		if apt-cache show virtiofsd >/dev/null 2>&1; then install virtiofsd
		else install qemu-system-common; fi
	fi
	.venv/bin/pyvmm testbed setup
fi
