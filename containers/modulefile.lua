-- The image as an Lmod module: commands instead of `apptainer exec ...`.
--
-- Copy it to DIRECTORY/nanogpt/VERSION.lua, the image to DIRECTORY/nanogpt/VERSION.sif, and then
--   module use DIRECTORY && module load nanogpt
local image = myFileName():gsub("%.lua$", ".sif")
local commands = { "nanogpt", "prep-fineweb", "prep-text", "torchrun" }

help([[
The NanoGPT speedrun, in an Apptainer image: nanogpt doctor, prep-fineweb, nanogpt launch RECIPE.
Directories outside home and the current one are visible inside if APPTAINER_BIND names them.
NANOGPT_SIF names the image, also for slurm/run.sh in a clone.
]])
whatis("Name: nanogpt")
whatis("Version: " .. myModuleVersion())
whatis("Description: The modded-NanoGPT speedrun: PyTorch, FlashAttention and trainer in one image")

if mode() == "load" and not isFile(image) then
    LmodError("there is no image " .. image .. "; make sif or make pull makes one")
end
if mode() == "load" and capture("command -v apptainer || command -v singularity") == "" then
    try_load("apptainer")
end
setenv("NANOGPT_SIF", image)
for _, command in ipairs(commands) do
    local run = 'apptainer exec $(test ! -e /dev/nvidiactl || echo --nv) "$NANOGPT_SIF" ' .. command
    set_shell_function(command, run .. ' "$@"', "apptainer exec --nv $NANOGPT_SIF " .. command .. " $*")
end
