#!/bin/sh
# Prepares a Debian or Ubuntu host for Intel GPUs: driver packages, the group render, microcode, the
# clock governor. Shows what it would do; `--apply` does it. A second run changes nothing.
#
#   host-setup.sh [--apply] [--user NAME]... [--root DIR]
#
# --user   who may use the GPUs, besides the caller of sudo (may be repeated)
# --root   folder that etc and sys are taken from, / else
# Exit status: 0 done or shown, 1 something failed, 2 wrong usage.
set -eu

apply=no root='' users=${SUDO_USER:-} changes=0 notes=0
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

while [ $# -gt 0 ]; do
  case $1 in
    --apply) apply=yes ;;
    --user) [ $# -gt 1 ] || { usage >&2; exit 2; }; users="$users $2"; shift ;;
    --root) [ $# -gt 1 ] || { usage >&2; exit 2; }; root=${2%/}; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "host-setup: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

ok() { echo "ok      $*"; }
note() { notes=$((notes + 1)); echo "note    $*"; }
fail() { echo "host-setup: $*" >&2; exit 1; }

# change TEXT COMMAND...: say it, and with --apply do it.
change() {
  text=$1
  shift
  changes=$((changes + 1))
  if [ "$apply" = no ]; then
    echo "would   $text"
    return
  fi
  echo "change  $text"
  "$@" >/dev/null || fail "$text: failed; nothing after it was done"
}

# --- Packages ------------------------------------------------------------------------------------
is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
is_known() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: //p' | grep -qv '(none)'; }

# need WHAT ADVICE NAME...: one of the names, the newest first.
need() {
  what=$1 advice=$2
  shift 2
  for name in "$@"; do
    if is_installed "$name"; then
      ok "$what: $name"
      return
    fi
  done
  for name in "$@"; do
    if is_known "$name"; then
      change "install $name ($what)" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "$name"
      return
    fi
  done
  note "$what: none of $* is in the package sources; $advice"
}

packages() {
  command -v apt-get >/dev/null || fail "needs apt: on other systems install intel-compute-runtime, level-zero and microcode by hand"
  if [ "$apply" = yes ] && ! apt-get update -q >/dev/null 2>&1; then
    note 'apt-get update failed: the lists of packages may be old'
  fi
  newer="Ubuntu 24.04's universe has it; for the B series take Intel's graphics packages, 24.39 or newer"
  firmware="add contrib non-free-firmware to the Debian sources"
  need 'OpenCL driver' "$newer" intel-opencl-icd
  need 'Level Zero loader' "$newer" libze1 level-zero
  need 'Level Zero GPU driver' "$newer" libze-intel-gpu1 intel-level-zero-gpu
  need 'GPU firmware' "$firmware" firmware-intel-graphics linux-firmware firmware-misc-nonfree
  need 'processor microcode' "$firmware" intel-microcode
  need 'PCI tools' 'it is in every main section' pciutils
  need 'Python environments' 'it is in every main section' python3-venv
}

# --- The group that may use /dev/dri/renderD* ----------------------------------------------------
group() {
  if getent group render >/dev/null; then
    ok 'group render'
  else
    change 'add the group render' groupadd --system render
  fi
  for user in $users; do
    if ! getent passwd "$user" >/dev/null; then
      note "user $user does not exist here"
    elif id -nG "$user" | tr ' ' '\n' | grep -qx render; then
      ok "$user is in the group render"
    else
      change "put $user into the group render (holds from the next login on)" usermod -aG render "$user"
    fi
  done
}

# --- Clock governor, as a unit: it holds after a restart -----------------------------------------
unit_text() {
  cat <<'UNIT'
# Made by XeRay's host-setup.sh.
[Unit]
Description=Clock governor performance, for steady times per token
ConditionPathExists=/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'for f in /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor; do echo performance > "$f"; done'

[Install]
WantedBy=multi-user.target
UNIT
}

write_unit() {
  mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
  unit_text >"$1.new"
  mv "$1.new" "$1"
}

governor() {
  unit=$root/etc/systemd/system/xeray-governor.service
  wanted=$root/etc/systemd/system/multi-user.target.wants/xeray-governor.service
  if [ -f "$unit" ] && [ "$(cat "$unit")" = "$(unit_text)" ]; then
    ok 'unit xeray-governor.service'
  else
    change "write $unit" write_unit "$unit"
  fi
  if [ -L "$wanted" ]; then
    ok 'xeray-governor.service starts at boot'
  else
    change 'let xeray-governor.service start at boot' ln -s ../xeray-governor.service "$wanted"
  fi
  file=$root/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor
  if [ ! -e "$file" ]; then
    ok 'the clock is not governed here (virtual machine, or set by the firmware)'
  elif [ "$(cat "$file")" = performance ]; then
    ok 'governor performance'
  elif [ -d "$root/run/systemd/system" ] && command -v systemctl >/dev/null; then
    change 'set the governor performance now' start_unit
  else
    note 'the governor becomes performance at the next start'
  fi
}

start_unit() { systemctl daemon-reload && systemctl restart xeray-governor.service; }

# --- Resizable BAR: a firmware setting, so there is only advice ----------------------------------
# Line 3 of `resource` is BAR 2, the window onto the card's memory: "0xSTART 0xEND 0xFLAGS".
rebar() {
  found=no small=no
  for device in "$root"/sys/bus/pci/devices/*; do
    [ -e "$device/vendor" ] && [ "$(cat "$device/vendor")" = 0x8086 ] || continue
    case $(cat "$device/class") in 0x0300* | 0x0380*) ;; *) continue ;; esac
    address=${device##*/}
    [ "${address#*:}" != 00:02.0 ] || continue # the integrated GPU has no window of this kind
    found=yes
    window=$(sed -n 3p "$device/resource" | (read -r start end _ && echo $((end - start + 1))))
    if [ "$window" -gt 268435456 ]; then
      ok "Resizable BAR of the card $address: $((window / 1073741824)) GiB"
    else
      small=yes
      note "Resizable BAR of the card $address is off: its window is $((window / 1048576)) MiB"
    fi
  done
  [ "$found" = yes ] || ok 'Resizable BAR: no discrete Intel card here'
  if [ "$small" = yes ]; then
    cat <<'ADVICE'
        In the firmware setup (Del or F2 at start): enable "Above 4G Decoding", then "Re-Size BAR
        Support" (ASUS, MSI: PCI subsystem; Dell, HP, Lenovo: with a firmware of 2021 or later);
        boot by UEFI, with the compatibility module (CSM) off. Then run this again.
ADVICE
  fi
}

if [ "$apply" = yes ] && [ -z "$root" ] && [ "$(id -u)" != 0 ]; then
  fail '--apply needs root: sudo sh host-setup.sh --apply'
fi
packages
group
governor
rebar
if [ "$apply" = yes ]; then
  echo "$changes changes made, $notes notes"
else
  echo "$changes changes to make, $notes notes; --apply makes them"
fi
