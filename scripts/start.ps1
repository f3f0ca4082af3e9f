# Start one cluster or all four in the background, wait until each node is ready, and say where they are.
# usage: start.ps1 [all|lock|queue|cache|secure]
# $env:PYTHON chooses the interpreter, $env:PORT_BASE moves the ports (8000), $env:START_TIMEOUT: seconds (60).
. (Join-Path $PSScriptRoot 'lib.ps1')

$service = Get-ServiceArgument -Script 'start.ps1' -Words $args
Initialize-Environment -Files $ServiceRequirements
Invoke-Nodes -Verb 'start' -Service $service
exit $LASTEXITCODE
