# Run every test; arguments go to pytest (paths are seen from the top of this copy).
# usage: test.ps1 [pytest arguments]      e.g. test.ps1 queue-py -k recovery
. (Join-Path $PSScriptRoot 'lib.ps1')

$testRequirements = Join-Path (Join-Path $Root 'testkit') 'requirements.txt'
Initialize-Environment -Files ($ServiceRequirements + $testRequirements)
Push-Location -LiteralPath $Root
try {
    $words = @('-m', 'pytest', '-q', '--durations=15', '--durations-min=1') + $args
    & $VenvPython @words
    $code = $LASTEXITCODE
}
finally {
    Pop-Location
}
exit $code
