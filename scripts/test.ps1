# Run every test; arguments go to pytest (paths are seen from the top of this copy).
# usage: test.ps1 [pytest arguments]      e.g. test.ps1 queue-py -k recovery
# TEST_WORKERS: how many processes share the files (3: tests of real nodes mostly wait); 0 runs all in one, as
# --pdb and -s want it.
. (Join-Path $PSScriptRoot 'lib.ps1')

$testRequirements = Join-Path (Join-Path $Root 'testkit') 'requirements.txt'
Initialize-Environment -Files ($ServiceRequirements + $testRequirements)
Push-Location -LiteralPath $Root
try {
    # Some hundred nodes are started below: none of them shall compile its service again.
    Remove-Item -Path Env:PYTHONDONTWRITEBYTECODE -ErrorAction SilentlyContinue
    $workers = if ($env:TEST_WORKERS) { $env:TEST_WORKERS } else { '3' }
    $words = @('-m', 'pytest', '-q', '--durations=15', '--durations-min=1')
    $words += @('-n', $workers, '--dist', 'loadfile', '--no-loadscope-reorder', '-p', 'testkit.ordering') + $args
    & $VenvPython @words
    $code = $LASTEXITCODE
}
finally {
    Pop-Location
}
exit $code
