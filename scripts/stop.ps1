# Stop what start.ps1 started, and nothing else. Data stays under .run\<service>\data.
# usage: stop.ps1 [all|lock|queue|cache|secure]
. (Join-Path $PSScriptRoot 'lib.ps1')

$service = Get-ServiceArgument -Script 'stop.ps1' -Words $args
Invoke-Nodes -Verb 'stop' -Service $service
exit $LASTEXITCODE
