#!/usr/bin/env bash
# Loads a site's settings, for the scripts beside this one (sourced) and for make (slurm/use_site.sh -c COMMAND, as a shell):
# from NANOGPT_SITE, else from slurm/site.sh, if it exists. slurm/sites/ has some to copy.
#
# A site's file is written for a login shell: nothing in it may end the script silently, change the directory or
# write into the command's output. It is sourced once per command and node. Expects and keeps `set -euo pipefail`, except
# for -e if the script does not set it.

site_say() { echo "${0##*/} on $(hostname): $*" >&2; }

use_site() { # the directory of the scripts
    local place=${NANOGPT_SITE:-} here=${SLURM_JOB_ID:-}@${SLURMD_NODENAME:-$HOSTNAME}
    nanogpt_name=NANOGPT_SITE=$place nanogpt_directory=$PWD nanogpt_failed='' nanogpt_options=$-
    if [[ -z $place ]]; then
        place=$1/site.sh nanogpt_name=$1/site.sh
        if [[ ! -e $place ]]; then place=''; fi
    fi
    if [[ ${SITE_USED_BY_NANOGPT:-} == "$place:$here" ]]; then return; fi # by the script that has called this one
    NANOGPT_GIVEN=$(compgen -e | grep '^NANOGPT_' | grep -Ev '_(GIVEN|SCRIPTS|RELAY|PID_FILE|STAGED_[A-Z]*)$' | tr '\n' ' ' || true)
    export NANOGPT_GIVEN SITE_USED_BY_NANOGPT=$place:$here
    if [[ -z $place ]]; then return; fi
    if [[ ! -f $place || ! -r $place ]]; then
        site_say "$nanogpt_name: no such file, or not readable. Name one that this machine can read, or unset it"
        exit 2
    fi
    if [[ $place != */* ]]; then place=./$place; fi # or PATH is searched
    if [[ -n ${NANOGPT_SITE:-} ]]; then nanogpt_name=NANOGPT_SITE=$place; fi
    nanogpt_site=$place
    site_failed() { # exit code, file, line, command
        if [[ $2 != "$nanogpt_site" ]]; then return; fi
        nanogpt_failed=yes
        site_say "$nanogpt_name, line $3: \`$4\` failed (exit code $1); continuing without it"
    }
    site_has_no_module() {
        site_say "there is no command 'module' here. Put the line that defines it before its first use in" \
            "$nanogpt_site: . DIRECTORY/init/bash, where a login shell's \$LMOD_PKG or \$MODULESHOME names the directory"
        return 127
    }
    set +eu +o pipefail
    if grep -Eqw 'module|ml' "$nanogpt_site" && ! type module > /dev/null 2>&1; then # as in a batch job's shell
        for nanogpt_init in ${LMOD_PKG:+"$LMOD_PKG/init/bash"} ${MODULESHOME:+"$MODULESHOME/init/bash"} \
            /etc/profile.d/{modules,lmod,z00_lmod}.sh /usr/share/{lmod/lmod,modules,Modules}/init/bash; do
            # shellcheck disable=SC1090
            if [[ -r $nanogpt_init ]]; then . "$nanogpt_init" >&2; fi
            if type module > /dev/null 2>&1; then break; fi
        done
        type module > /dev/null 2>&1 || module() { site_has_no_module; }
        type ml > /dev/null 2>&1 || ml() { module "$@"; }
    fi
    trap 'site_say "$nanogpt_name has ended the script (exit code $?): take its \`exit\` out"; exit 2' EXIT
    trap 'site_failed "$?" "${BASH_SOURCE[0]}" "$LINENO" "$BASH_COMMAND"' ERR
    # shellcheck disable=SC1090
    . "$nanogpt_site" >&2
    nanogpt_code=$?
    trap - ERR EXIT
    if ((nanogpt_code)) && [[ -z $nanogpt_failed ]]; then
        site_say "$nanogpt_name: ended early (exit code $nanogpt_code); what it says is above. Continuing"
    fi
    unset IFS CDPATH
    set -uo pipefail
    if [[ $nanogpt_options == *e* ]]; then set -e; fi
    cd "$nanogpt_directory"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then # make's shell
    set -euo pipefail
    use_site "$(cd -P "$(dirname "$0")" && pwd)"
    exec /bin/sh "$@"
fi
